"""What the AR's vision tower makes of pictures of the tiny world."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from diffusers import GlmImagePipeline
from PIL import Image
from torch import Tensor

_AT_ONCE = 64


@torch.no_grad()
def vision_features(pipeline: GlmImagePipeline, images: Iterable[Image.Image]) -> Tensor:
    """Of pictures of one size, before they are quantised: [N, tokens, C]."""
    parts = []
    for features, _ in _seen(pipeline, images):
        parts += [own.flatten(1).T for own in features]
    return torch.stack(parts)


@torch.no_grad()
def image_codes(pipeline: GlmImagePipeline, images: Iterable[Image.Image]) -> Tensor:
    """The tokens of pictures of one size, int64 [N, tokens]."""
    model, parts = pipeline.vision_language_encoder, []
    for features, grids in _seen(pipeline, images):
        parts.append(model.get_image_tokens(features, grids).view(len(grids), -1))
    return torch.cat(parts)


def _seen(
    pipeline: GlmImagePipeline, images: Iterable[Image.Image]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Feature maps and grids of some at once: previews of thousands of cards are gigabytes."""
    rest = iter(images)
    while some := list(islice(rest, _AT_ONCE)):
        inputs = pipeline.processor.image_processor(images=some, return_tensors="pt")
        grids = inputs["image_grid_thw"]
        model = pipeline.vision_language_encoder
        yield model.get_image_features(inputs["pixel_values"], grids).pooler_output, grids
