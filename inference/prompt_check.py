"""Prompts that the checkpoint's own tokenizers cannot take, told before anything is sampled."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from duet.configs.errors import UserError
from duet.configs.quotes import quoted_spans
from duet.configs.row import Row
from duet.inference.glyphs import MAX_GLYPH_TOKENS
from duet.inference.layout import Size
from duet.inference.outline import Outline
from duet.inference.prompt import text_grids, text_prompt
from duet.inference.request import Request


def check_prompts(outline: Outline, rows: Iterable[Row], size: Size, show: bool = True) -> None:
    """Raises UserError, with the row's place, for control tokens in a prompt and for one that is
    too long for the AR or for the glyph encoder; and for a size that leaves no room for any."""
    tokenizer = outline.processor.tokenizer
    longest = min(outline.positions, tokenizer.model_max_length)
    # what stands around a prompt, and what the AR writes behind it
    bare = text_prompt(outline.processor, Request("a", (0,), size))
    written = sum(grid.count for grid in text_grids(size))
    room = longest - len(bare.ids) + 1 - written
    if room < 1:
        raise UserError(
            f"height = {size.height} and width = {size.width} are {written} tokens to write, of "
            f"the {longest} that the AR takes, and leave no room for a prompt: take a smaller size"
        )
    prompts = _Reader("the AR", tokenizer, room)
    glyphs = _Reader("the glyph encoder", outline.tokenizer, MAX_GLYPH_TOKENS - 1)  # its </s>
    with tqdm(rows, "checking prompts", leave=False, disable=None if show else True) as bar:
        for row in bar:
            prompts.check(row, row.prompt)
            for span in quoted_spans(row.prompt):
                glyphs.check(row, span)


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
