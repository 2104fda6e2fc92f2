"""Prompts that the checkpoint's own tokenizers cannot take, told before anything is sampled."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from duet.configs.errors import UserError
from duet.configs.quotes import quoted_spans
from duet.configs.row import Row
from duet.inference.glyphs import MAX_GLYPH_TOKENS
from duet.inference.layout import Size
from duet.inference.outline import Outline
from duet.inference.prompt import Prompt, edit_prompt, text_grids, text_prompt
from duet.inference.request import Request
from duet.inference.sources import source_sizes


def check_prompts(
    outline: Outline,
    rows: Iterable[Row],
    size: Size,
    show: bool = True,
    source_sized: bool = False,
) -> None:
    """Raises UserError, with the row's place, for control tokens in a prompt and for one that is
    too long for the AR or for the glyph encoder; for a source that the image processor refuses;
    and for a size, or sources, that leave no room for any prompt.

    `source_sized`: an edit's picture takes the size of its first source, not `size`.
    """
    rooms = _Rooms(outline)
    glyphs = _Reader("the glyph encoder", outline.tokenizer, MAX_GLYPH_TOKENS - 1)  # its </s>
    with tqdm(rows, "checking prompts", leave=False, disable=None if show else True) as bar:
        for row in bar:
            sources = source_sizes(outline.processor.image_processor, row)
            if sources:
                target = sources[0] if source_sized else size
                prompts = rooms.edit(row.where, target, sources)
            else:
                prompts = rooms.text(size)
            prompts.check(row, row.prompt)
            for span in quoted_spans(row.prompt):
                glyphs.check(row, span)


class _Rooms:
    """How many tokens of a prompt find room beside all others that the AR takes."""

    def __init__(self, outline: Outline) -> None:
        self.processor = outline.processor
        self.longest = min(outline.positions, outline.processor.tokenizer.model_max_length)
        self.known: dict[tuple[Size, ...], _Reader] = {}

    def text(self, size: Size) -> "_Reader":
        if (size,) not in self.known:
            room = self._left(text_prompt(self.processor, Request("a", (0,), size)))
            if room < 1:
                written = sum(grid.count for grid in text_grids(size))
                raise UserError(
                    f"height = {size.height} and width = {size.width} are {written} tokens to "
                    f"write, of the {self.longest} that the AR takes, and leave no room for a "
                    "prompt: take a smaller size"
                )
            self.known[size,] = _Reader("the AR", self.processor.tokenizer, room)
        return self.known[size,]

    def edit(self, where: str, target: Size, sources: tuple[Size, ...]) -> "_Reader":
        key = target, *sources
        if key not in self.known:
            blank = tuple(Image.new("RGB", (size.width, size.height)) for size in sources)
            tokens = tuple(torch.zeros(size.grid.count, dtype=torch.int64) for size in sources)
            asked = Request("a", (0,), target, blank, source_tokens=tokens)
            room = self._left(edit_prompt(self.processor, asked))
            if room < 1:
                counted = sum(size.grid.count for size in key)
                raise UserError(
                    f"{where}: its {len(sources)} sources and its picture are {counted} tokens, of "
                    f"the {self.longest} that the AR takes, and leave no room for a prompt: give "
                    "fewer sources, or a smaller size"
                )
            self.known[key] = _Reader("the AR", self.processor.tokenizer, room)
        return self.known[key]

    def _left(self, bare: Prompt) -> int:
        """`bare`: around a prompt of one token."""
        return self.longest - len(bare.ids) + 1 - bare.count


@dataclass(frozen=True)
class _Reader:
    name: str
    tokenizer: PreTrainedTokenizerBase
    room: int  # tokens

    @cached_property
    def control(self) -> dict[int, str]:
        """Tokens that mean something to the model: a user's text must not hold them."""
        return {id: token.content for id, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    def check(self, row: Row, text: str) -> None:
        begins = f"{text[:40]!r}" + ("..." if len(text) > 40 else "")
        allowed = f"{self.name} takes at most {self.room} tokens at this size: shorten it"
        if len(text) > self.room * self.longest_token:  # told at once, whatever its length
            raise UserError(
                f"{row.where}: {begins} of the prompt has {len(text)} characters: {allowed}"
            )
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        control = next((self.control[id] for id in ids if id in self.control), None)
        if control is not None:
            raise UserError(
                f"{row.where}: the prompt holds {control!r}, a control token of {self.name}'s "
                "tokenizer: take it out"
            )
        if len(ids) > self.room:
            raise UserError(f"{row.where}: {begins} of the prompt has {len(ids)} tokens: {allowed}")
