"""A request as the AR reads it: ids, positions, and the grids it is to write."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import ProcessorMixin

from duet.configs.errors import UserError
from duet.inference.layout import Grid, Size, grid_positions, preview_grid, prompt_positions
from duet.inference.request import Request
from duet.inference.sources import source_grid


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

    @property
    def all_positions(self) -> Tensor:
        """Of the prompt and of what will be written, int64 [3, P + T]."""
        return positions_of([self])[0]


def positions_of(prompts: Sequence[Prompt]) -> list[Tensor]:
    """Of each prompt and of what it will write; grids that several write are laid out once."""
    written = {grids: grid_positions(grids) for grids in {p.grids for p in prompts}}
    return [torch.cat([p.positions, written[p.grids] + p.start], -1) for p in prompts]


def text_prompt(processor: ProcessorMixin, request: Request) -> Prompt:
    """Text to image: text positions run on, then preview and large grid are written."""
    ids = _read(processor, request)
    positions = torch.arange(len(ids)).expand(3, -1)
    return Prompt(ids, positions, len(ids), text_grids(request.size))


def edit_prompt(processor: ProcessorMixin, request: Request) -> Prompt:
    """Image to image: the sources' tokens stand in front of the text, one grid is written.

    `request`: as `Engine.ready` gives it. Raises UserError for a chat template without sources.
    """
    ids = _read(processor, request)
    is_source = ids == processor.image_token_id
    start = int(is_source.int().argmax())
    if int(is_source.sum()) == 0 or int(ids[start - 1]) != processor.tokenizer.bos_token_id:
        raise UserError(
            "the checkpoint's chat template does not put a source between image start and end: "
            "take the released one"
        )
    positions = prompt_positions(is_source, [source_grid(p) for p in request.sources])
    ids = ids.masked_scatter(is_source, torch.cat(request.source_tokens))
    return Prompt(ids, positions.columns, positions.end, (request.size.grid,))


def _read(processor: ProcessorMixin, request: Request) -> Tensor:
    """Ids [P], with a placeholder for each token of a source."""
    content = [{"type": "image", "image": picture} for picture in request.sources]
    content += [{"type": "text", "text": request.prompt}]
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
    return inputs["input_ids"][0]


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
        ids = [p.ids for p in prompts]
        return cls(
            left_padded(ids, pad_id).to(device),
            not_padding(ids, device),
            left_padded(positions_of(prompts), 0).transpose(0, 1).to(device),
        )


def left_padded(rows: Sequence[Tensor], value: float) -> Tensor:
    """Tensors [..., L] of several lengths -> [B, ..., longest], each at the right."""
    longest = max(row.shape[-1] for row in rows)
    return torch.stack([pad(row, (longest - row.shape[-1], 0), value=value) for row in rows])


def not_padding(rows: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """What `left_padded` has of the rows [L], int64 [B, longest], 0 elsewhere; None: all of it."""
    if len({len(row) for row in rows}) == 1:
        return None
    return left_padded([torch.ones_like(row) for row in rows], 0).to(device)
