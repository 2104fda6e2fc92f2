"""Source pictures of an edit: brought once to the size that the AR and the VAE both take."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import GlmImageImageProcessor
from transformers.models.glm_image.image_processing_glm_image import smart_resize

from duet.configs.errors import UserError
from duet.configs.pictures import Stored, read_picture, shown_size
from duet.configs.row import Row
from duet.inference.layout import PIXELS_PER_TOKEN, Grid, Size

_MOST_ASPECT = 4  # long side over short: of the image processor


@dataclass(frozen=True)
class Source:
    """What the DiT is told of a source, never its keys and values: those are the weights'."""

    latents: Tensor  # float32 [C, h, w], standardised, the VAE's mean
    tokens: Tensor  # int64 [2h' * 2w'], the AR's tokens of it at the DiT's resolution

    @property
    def size(self) -> Size:
        return Size(*(8 * side for side in self.latents.shape[1:]))

    def to(self, device: torch.device) -> "Source":
        return Source(self.latents.to(device), self.tokens.to(device))


def source_size(processor: GlmImageImageProcessor, stored: Stored) -> Size:
    """The size to which a picture is brought: its grid by the image processor, in whole tokens.

    Stock encodes latents at the picture's own size, which fits its tokens for multiples of 32
    within the processor's bounds alone. Raises UserError for what the processor refuses.
    """
    width, height = shown_size(stored)
    found = _of_processor(processor, height, width)
    # rounded to whole tokens it may be out of the bounds again, and is moved within them
    while (again := _of_processor(processor, found.height, found.width)) != found:
        found = again
    return found


def source_sizes(processor: GlmImageImageProcessor, row: Row) -> tuple[Size, ...]:
    """Of a row's sources in their order. Raises UserError with the row's place."""
    sizes = []
    for place, stored in enumerate(row.sources):
        try:
            sizes.append(source_size(processor, stored))
        except UserError as error:
            raise UserError(f"{row.where}: sources[{place}]: {error}") from error
    return tuple(sizes)


def _of_processor(processor: GlmImageImageProcessor, height: int, width: int) -> Size:
    least = processor.patch_size * processor.merge_size
    short, long = sorted((height, width))
    if short < least or long > _MOST_ASPECT * short:
        raise UserError(
            f"a source of {width} x {height} pixels: allowed are sides of at least {least} pixels, "
            f"the longer at most {_MOST_ASPECT} times the shorter"
        )
    resized = smart_resize(
        height, width, least, processor.size["shortest_edge"], processor.size["longest_edge"]
    )
    sides = [side // processor.patch_size * PIXELS_PER_TOKEN for side in resized]
    # rounding may have made it longer than the processor itself allows
    return Size(*(min(side, _MOST_ASPECT * min(sides)) for side in sides))


def source_grid(picture: Image.Image) -> Grid:
    """Of a picture at its size."""
    return Size(picture.height, picture.width).grid


def at_size(stored: Stored, size: Size) -> Image.Image:
    """The whole picture in RGB, resampled to that size."""
    picture, sides = read_picture(stored), (size.width, size.height)
    if picture.size == sides:
        return picture
    return picture.resize(sides, Image.Resampling.LANCZOS)
