"""What the AR's vision tower makes of pictures of the tiny world."""

from collections.abc import Sequence

import torch
from diffusers import GlmImagePipeline
from PIL import Image
from torch import Tensor

_AT_ONCE = 64


@torch.no_grad()
def vision_features(pipeline: GlmImagePipeline, images: Sequence[Image.Image]) -> Tensor:
    """Of pictures of one size, before they are quantised: [N, tokens, C]."""
    model, parts = pipeline.vision_language_encoder, []
    for start in range(0, len(images), _AT_ONCE):
        some = list(images[start : start + _AT_ONCE])
        inputs = pipeline.processor.image_processor(images=some, return_tensors="pt")
        output = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        parts += [features.flatten(1).T for features in output.pooler_output]
    return torch.stack(parts)


@torch.no_grad()
def image_codes(pipeline: GlmImagePipeline, images: Sequence[Image.Image]) -> Tensor:
    """The tokens of pictures of one size, int64 [N, tokens]."""
    model, parts = pipeline.vision_language_encoder, []
    for start in range(0, len(images), _AT_ONCE):
        some = list(images[start : start + _AT_ONCE])
        inputs = pipeline.processor.image_processor(images=some, return_tensors="pt")
        grids = inputs["image_grid_thw"]
        features = model.get_image_features(inputs["pixel_values"], grids)
        codes = model.get_image_tokens(features.pooler_output, grids)
        parts.append(codes.view(len(some), -1))
    return torch.cat(parts)
