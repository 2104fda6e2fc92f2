"""The parts of a checkpoint without its weights: of the released sizes, or those of a folder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from torch.nn import Module
from transformers import (
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessor,
    T5Config,
    T5EncoderModel,
)

from duet.configs.errors import UserError, first_line

CODEBOOK = 16384


@dataclass(frozen=True)
class Scale:
    """Layers and widths; everything else is the released checkpoint's."""

    ar_layers: int = 40
    ar_hidden: int = 4096
    ar_heads: int = 32  # of width 128
    vision_layers: int = 40
    dit_layers: int = 30
    dit_heads: int = 32  # of width 128
    glyph_width: int = 1472
    vae_channels: tuple[int, ...] = (128, 512, 1024, 1024)


def build_ar(scale: Scale, pad_token_id: int = 167841) -> GlmImageForConditionalGeneration:
    config = GlmImageConfig(
        text_config={
            "vocab_size": 168064,
            "hidden_size": scale.ar_hidden,
            "intermediate_size": scale.ar_hidden * 13696 // 4096,
            "num_hidden_layers": scale.ar_layers,
            "num_attention_heads": scale.ar_heads,
            "num_key_value_heads": 2,
            "pad_token_id": pad_token_id,
            "eos_token_id": CODEBOOK + 1,
            "vision_vocab_size": 16512,
            # GLM-4's: half of a head's width turns, as the sections' sum of 32 has it
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [8, 12, 12],
            },
        },
        vision_config={"depth": scale.vision_layers},
        vq_config={"num_embeddings": CODEBOOK},
    )
    return GlmImageForConditionalGeneration(config)


def build_dit(scale: Scale) -> GlmImageTransformer2DModel:
    return GlmImageTransformer2DModel(
        num_layers=scale.dit_layers,
        num_attention_heads=scale.dit_heads,
        attention_head_dim=128,
        text_embed_dim=scale.glyph_width,
        time_embed_dim=512,
        prior_vq_quantizer_codebook_size=CODEBOOK,
    )


def build_vae(scale: Scale) -> AutoencoderKL:
    """Standardised latents are taken as they are: mean 0, standard deviation 1."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=scale.vae_channels,
        layers_per_block=3,
        latent_channels=16,
        latents_mean=(0.0,) * 16,
        latents_std=(1.0,) * 16,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_glyph_encoder(scale: Scale) -> T5EncoderModel:
    """ByT5-small's shape."""
    return T5EncoderModel(
        T5Config(
            vocab_size=384,
            d_model=scale.glyph_width,
            d_kv=64,
            d_ff=scale.glyph_width * 3584 // 1472,
            num_layers=12,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


Sizes = Path | Scale  # a checkpoint's folder with its config.json files, or the released one's


def build_part(component: str, sizes: Sizes, dtype: torch.dtype, layers: int | None) -> Module:
    """One part, frozen, on the meta device.

    `component`: the name that `GlmImagePipeline` gives it; `layers`: of the AR, whose vision
    tower then has one, or of the DiT; None: its own. Raises UserError where a folder does not tell.
    """
    try:
        with torch.device("meta"), default_dtype(dtype):
            return builders(sizes, layers)[component]().requires_grad_(False).eval()
    except OSError as error:
        raise UserError(f"{component} of {str(sizes)!r}: {first_line(error)}") from error


def builders(sizes: Sizes, layers: int | None = None) -> dict[str, Callable[[], Module]]:
    """What makes each part, with weights drawn at random, wherever torch is told to."""
    return _of_folder(sizes, layers) if isinstance(sizes, Path) else _of_scale(sizes, layers)


def _of_scale(scale: Scale, layers: int | None) -> dict[str, Callable[[], Module]]:
    if layers is not None:
        scale = replace(scale, ar_layers=layers, vision_layers=1, dit_layers=layers)
    return {
        "vision_language_encoder": lambda: build_ar(scale),
        "transformer": lambda: build_dit(scale),
        "vae": lambda: build_vae(scale),
        "text_encoder": lambda: build_glyph_encoder(scale),
    }


def _of_folder(folder: Path, layers: int | None) -> dict[str, Callable[[], Module]]:
    def ar() -> Module:
        config = GlmImageConfig.from_pretrained(folder / "vision_language_encoder")
        if layers is not None:
            config.text_config.num_hidden_layers, config.vision_config.depth = layers, 1
        return GlmImageForConditionalGeneration(config)

    def dit() -> Module:
        config = GlmImageTransformer2DModel.load_config(folder / "transformer")
        return GlmImageTransformer2DModel.from_config(
            config, num_layers=layers or config["num_layers"]
        )

    return {
        "vision_language_encoder": ar,
        "transformer": dit,
        "vae": lambda: AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
        "text_encoder": lambda: T5EncoderModel(T5Config.from_pretrained(folder / "text_encoder")),
    }


def image_processor(sizes: Sizes) -> GlmImageImageProcessor:
    """What brings sources to their sizes. Raises UserError where a folder does not tell."""
    if not isinstance(sizes, Path):
        edges = {"shortest_edge": 512**2, "longest_edge": 2048**2}
        return GlmImageImageProcessor(patch_size=16, merge_size=1, size=edges)
    try:
        return GlmImageImageProcessor.from_pretrained(sizes / "processor")
    except OSError as error:
        raise UserError(f"processor of {str(sizes)!r}: {first_line(error)}") from error


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """While open, new parameters are of that dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
