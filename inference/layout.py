"""Token grids, chat inputs and M-RoPE positions of GLM-Image: pure functions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PIXELS_PER_TOKEN = 32
_PREVIEW_SIDE = 16  # a preview holds about 16 x 16 tokens whatever the image's size


@dataclass(frozen=True)
class Grid:
    """Height and width of a picture in visual tokens."""

    height: int
    width: int

    @property
    def count(self) -> int:
        return self.height * self.width


def large_grid(height_pixels: int, width_pixels: int) -> Grid:
    """The grid that reaches the DiT.

    Raises ValueError for a side that is no positive multiple of 32.
    """
    for name, side in (("height", height_pixels), ("width", width_pixels)):
        if side <= 0 or side % PIXELS_PER_TOKEN:
            nearest = max(1, round(side / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN
            raise ValueError(
                f"{name} = {side} is no positive multiple of {PIXELS_PER_TOKEN}: try {nearest}"
            )
    return Grid(height_pixels // PIXELS_PER_TOKEN, width_pixels // PIXELS_PER_TOKEN)


def preview_grid(large: Grid) -> Grid:
    """The preview that the AR writes before the large grid (GlmImageProcessor)."""
    ratio = large.height / large.width
    return Grid(int(math.sqrt(ratio) * _PREVIEW_SIDE), int(math.sqrt(1 / ratio) * _PREVIEW_SIDE))


def generation_grids(height_pixels: int, width_pixels: int) -> tuple[Grid, Grid]:
    """Text to image: (preview, large), the order in which they are written."""
    large = large_grid(height_pixels, width_pixels)
    return preview_grid(large), large


def prompt_positions(attention_mask: Tensor) -> Tensor:
    """M-RoPE positions of a text prompt, [B, P] -> [3, B, P]; left padding gets 0."""
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions.expand(3, *positions.shape)


def grid_positions(start: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """M-RoPE positions of generated grids, [B] first free positions -> [3, B, T].

    Token (row, col) of a grid that begins at p stands at (p, p + row, p + col),
    and the next grid begins at p + max(height, width)
    (GlmImageModel.get_rope_index and its decoding branch).
    """
    offset, columns = 0, []
    for grid in grids:
        row = torch.arange(grid.height).repeat_interleave(grid.width)
        col = torch.arange(grid.width).repeat(grid.height)
        columns.append(torch.stack([torch.zeros_like(row), row, col]) + offset)
        offset += max(grid.height, grid.width)
    relative = torch.cat(columns, dim=-1).to(start.device)  # [3, T]
    return start[None, :, None] + relative[:, None]


def split_grids(tokens: Tensor, grids: tuple[Grid, ...]) -> tuple[Tensor, ...]:
    """[B, T] -> one [B, h * w] a grid."""
    return tokens.split([g.count for g in grids], dim=-1)


def upsample_prior(tokens: Tensor, grid: Grid) -> Tensor:
    """Large-grid tokens [B, h * w] -> DiT prior tokens [B, 2h * 2w], nearest neighbour."""
    square = tokens.view(-1, grid.height, grid.width)
    return square.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
