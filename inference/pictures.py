"""Pictures in and out: latents to pixels, pixels to pictures, a picture to its tokens."""

import io

import numpy as np
import torch
from diffusers import GlmImagePipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from duet.configs.errors import UserError
from duet.configs.pictures import fit
from duet.inference.layout import Size

_PROCESSOR = VaeImageProcessor(vae_scale_factor=8)
_MEGAPIXEL = 1024 * 1024


def decode_pixels(vae, latents: Tensor) -> np.ndarray:
    """Standardised latents [B, C, h, w] -> float32 pixels [B, H, W, 3] in [0, 1].

    About a megapixel at once: the VAE's widest layer holds 512 channels of every pixel.
    """
    at_once = max(1, _MEGAPIXEL // (64 * latents.shape[-2] * latents.shape[-1]))
    decoded = (decode(vae, part) for part in latents.split(at_once))
    return np.concatenate([_PROCESSOR.postprocess(p, output_type="np") for p in decoded])


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Standardised latents [B, C, h, w] -> float32 pixels [B, 3, H, W] in [-1, 1]."""
    mean, std = latent_statistics(vae)
    return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0].float()


def encode(vae, image: Image.Image) -> Tensor:
    """A picture of whole tokens in RGB -> its standardised latents, float32 [C, h, w]."""
    return encode_pixels(vae, _PROCESSOR.preprocess(image).to(vae.device))[0]


@torch.no_grad()
def encode_pixels(vae, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] -> standardised latents, float32 [B, C, h, w].

    The mean of the VAE's distribution, as `GlmImagePipeline` takes it for a source.
    """
    mean, std = latent_statistics(vae)
    return (vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float() - mean) / std


def latent_statistics(vae) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that make latents standard, float32 [1, C, 1, 1] each."""
    names = "latents_mean", "latents_std"
    return tuple(torch.tensor(vae.config[n], device=vae.device).view(1, -1, 1, 1) for n in names)


def to_images(pixels: np.ndarray) -> list[Image.Image]:
    """Float pixels [B, H, W, 3] -> RGB pictures."""
    return _PROCESSOR.numpy_to_pil(pixels)


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@torch.no_grad()
def encode_prior(pipeline: GlmImagePipeline, image: Image.Image, size: Size) -> Tensor:
    """The large-grid tokens [h * w] that the AR's own vision tower gives a picture in RGB.

    Of another shape its centre is taken.

    Raises UserError for a size that the image processor's limits exclude.
    """
    ar = pipeline.vision_language_encoder
    inputs = pipeline.processor.image_processor(
        images=[fit(image, size.width, size.height)], return_tensors="pt"
    ).to(ar.device)
    grid = inputs["image_grid_thw"]
    if grid[0].tolist() != [1, size.grid.height, size.grid.width]:
        raise UserError(
            f"a reference image of {size.height} x {size.width} pixels gives the token grid "
            f"{grid[0].tolist()[1:]}: the image processor's size limits exclude it"
        )
    features = ar.get_image_features(inputs["pixel_values"], grid).pooler_output
    return ar.get_image_tokens(features, grid).cpu()
