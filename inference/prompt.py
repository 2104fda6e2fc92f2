"""A request as the AR reads it: ids, positions, and the grids it is to write."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import ProcessorMixin

from duet.inference.layout import Grid, Size, grid_positions, preview_grid
from duet.inference.request import Request


@dataclass(frozen=True)
class Prompt:
    """The tokens before the first visual token, without padding."""

    ids: Tensor  # int64 [P]
    positions: Tensor  # int64 [3, P], M-RoPE
    start: int  # the first free position: where the first grid begins
    grids: tuple[Grid, ...]  # in the order of writing; the last one reaches the DiT

    @property
    def count(self) -> int:
        """How many visual tokens are to be written."""
        return sum(grid.count for grid in self.grids)


def text_prompt(processor: ProcessorMixin, request: Request) -> Prompt:
    """Text to image: text positions run on, then preview and large grid are written."""
    content = [{"type": "text", "text": request.prompt}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        tokenize=True,
        return_dict=True,
        processor_kwargs={
            "target_h": request.size.height,
            "target_w": request.size.width,
            "return_tensors": "pt",
        },
    )
    ids = inputs["input_ids"][0]
    positions = torch.arange(len(ids)).expand(3, -1)
    return Prompt(ids, positions, len(ids), text_grids(request.size))


def text_grids(size: Size) -> tuple[Grid, Grid]:
    """Preview, then large: the order in which they are written."""
    return preview_grid(size.grid), size.grid


@dataclass(frozen=True)
class PromptBatch:
    """B prompts of the same grids, left-padded, and the positions of what they will write."""

    ids: Tensor  # int64 [B, P]
    mask: Tensor | None  # int64 [B, P], 0 on padding; None: there is none
    positions: Tensor  # int64 [3, B, P + T]

    def seen(self, written: int) -> Tensor | None:
        """The attention mask with so many visual tokens behind the prompt, [B, P + written]."""
        return None if self.mask is None else pad(self.mask, (0, written), value=1)

    def __getitem__(self, rows: Tensor) -> "PromptBatch":
        """Samples of the batch, int64 [B']."""
        mask = None if self.mask is None else self.mask[rows]
        return PromptBatch(self.ids[rows], mask, self.positions[:, rows])

    @classmethod
    def of(cls, prompts: Sequence[Prompt], pad_id: int, device: torch.device) -> "PromptBatch":
        grids = prompts[0].grids
        assert all(p.grids == grids for p in prompts)
        longest = max(len(p.ids) for p in prompts)
        room = [(longest - len(p.ids), 0) for p in prompts]
        ids = [pad(p.ids, r, value=pad_id) for p, r in zip(prompts, room, strict=True)]
        mask = [pad(torch.ones_like(p.ids), r) for p, r in zip(prompts, room, strict=True)]
        written = grid_positions(grids)
        positions = [
            torch.cat([pad(p.positions, r), written + p.start], -1)
            for p, r in zip(prompts, room, strict=True)
        ]
        padded = any(left for left, _ in room)
        return cls(
            torch.stack(ids).to(device),
            torch.stack(mask).to(device) if padded else None,
            torch.stack(positions, 1).to(device),
        )
