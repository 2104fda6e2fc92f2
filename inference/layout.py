"""Sizes, token grids and M-RoPE positions of GLM-Image: pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duet.configs.errors import UserError
from duet.configs.policy_schema import SamplingConfig

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


@dataclass(frozen=True, order=True)
class Size:
    """Height and width of a picture in pixels.

    Raises UserError for a side that is no positive multiple of 32.
    """

    height: int
    width: int

    @classmethod
    def of(cls, sampling: SamplingConfig) -> "Size":
        return cls(sampling.height, sampling.width)

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            side = getattr(self, name)
            if side <= 0 or side % PIXELS_PER_TOKEN:
                nearest = max(1, round(side / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN
                raise UserError(
                    f"{name} = {side} is no positive multiple of {PIXELS_PER_TOKEN}: try {nearest}"
                )

    @property
    def grid(self) -> Grid:
        """The grid that reaches the DiT."""
        return Grid(self.height // PIXELS_PER_TOKEN, self.width // PIXELS_PER_TOKEN)

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width in latents."""
        return self.height // 8, self.width // 8

    @property
    def dit_tokens(self) -> int:
        """How many tokens the DiT makes of the latents: 2 x 2 of them each."""
        return self.grid.count * 4


def preview_grid(large: Grid) -> Grid:
    """The preview that the AR writes before the large grid (GlmImageProcessor)."""
    ratio = large.height / large.width
    return Grid(int(math.sqrt(ratio) * _PREVIEW_SIDE), int(math.sqrt(1 / ratio) * _PREVIEW_SIDE))


def grid_positions(grids: tuple[Grid, ...]) -> Tensor:
    """M-RoPE positions of generated grids, counted from the first free one: int64 [3, T].

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
    return torch.cat(columns, dim=-1)


@dataclass(frozen=True)
class Positions:
    """M-RoPE positions of a prompt."""

    columns: Tensor  # int64 [3, P]
    end: int  # the first free one


def prompt_positions(is_source: Tensor, sources: Sequence[Grid]) -> Positions:
    """Of a prompt whose sources' tokens stand where `is_source` (bool [P]) says, in their order.

    Text runs on; a source that begins at p takes the positions of its grid, and the text behind
    it goes on at p + max(height, width) (GlmImageModel.get_rope_index).
    """
    columns, here, done = [], 0, 0

    def text(count: int) -> None:
        nonlocal here
        columns.append(torch.arange(here, here + count).expand(3, -1))
        here += count

    for grid in sources:
        start = done + int(is_source[done:].int().argmax())
        text(start - done)
        columns.append(grid_positions((grid,)) + here)
        here += max(grid.height, grid.width)
        done = start + grid.count
    assert int(is_source.sum()) == sum(grid.count for grid in sources)
    text(len(is_source) - done)
    return Positions(torch.cat(columns, -1), here)


def upsample_prior(tokens: Tensor, grid: Grid) -> Tensor:
    """Large-grid tokens [B, h * w] -> DiT prior tokens [B, 2h * 2w], nearest neighbour."""
    square = tokens.view(-1, grid.height, grid.width)
    return square.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
