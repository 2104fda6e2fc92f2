"""Text accuracy by real OCR: what was asked to be drawn against what can be read."""

import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import permutations
from typing import Literal

import numpy as np
from PIL import Image
from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

from duet.configs.errors import UserError
from duet.rewards.base import RewardInput
from duet.rewards.ocr_reader import DET_SIZES, ENGINES, Reader, open_reader
from duet.rewards.wanted_text import wanted_texts

_ALL_ORDERS = 5  # up to this many spans every order is tried


class Ocr:
    """1 - edit distance / length of the wanted text, at least 0; surplus text costs.

    The wanted text is the row's `text` (a string or a list), else what the prompt quotes
    (`wanted_texts`); a text that the prompt quotes again may be drawn once or as often. Where
    no text is asked for the reward does not apply. The recogniser's own confidence is not
    used: it is easily cheated.
    """

    def __init__(
        self,
        limit_side_len: int = 512,
        enlarge_to: int = 0,
        ignore_case: bool = True,
        threads: int = 1,
        language: str = "ch",
        det_size: Literal["tiny", "small", "medium"] = "small",
        engine: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        """`enlarge_to`: least shorter side in pixels at which a picture is read.

        `language`: rapidocr's code. One model reads Chinese, Japanese and what is
        written in Latin letters. It and the small detector come with the package;
        rapidocr downloads any other. `threads`: readers side by side, of one CPU
        thread each.
        """
        for name, value, allowed in (
            ("det_size", det_size, DET_SIZES),
            ("engine", engine, ENGINES),
        ):
            if value not in allowed:
                raise UserError(f"ocr {name} {value!r}: allowed are {', '.join(allowed)}")
        if threads < 1:
            raise UserError(f"ocr threads {threads}: give a whole number >= 1")
        self.enlarge_to, self.ignore_case, self.threads = enlarge_to, ignore_case, threads
        self.settings = limit_side_len, language, det_size, engine

    @cached_property
    def readers(self) -> list[Reader]:
        return [open_reader(*self.settings) for _ in range(self.threads)]

    def load(self) -> None:
        _ = self.readers

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float | None]:
        shares = [inputs[i :: self.threads] for i in range(self.threads)]
        with ThreadPoolExecutor(self.threads) as pool:
            done = list(pool.map(self._score_share, self.readers, shares))
        return [done[i % self.threads][i // self.threads] for i in range(len(inputs))]

    def _score_share(self, reader: Reader, inputs: Sequence[RewardInput]) -> list[float | None]:
        return [self._score(reader, item) for item in inputs]

    def _score(self, reader: Reader, item: RewardInput) -> float | None:
        readings = [r for r in _readings(item, self.ignore_case) if r]
        if not readings:
            return None
        found = read_texts(reader, item.image, self.enlarge_to)
        return max(text_score(wanted, found, self.ignore_case) for wanted in readings)


def _readings(item: RewardInput, ignore_case: bool) -> list[list[str]]:
    """The lists of texts, any of which may be drawn."""
    text = item.row.get("text")
    if text is None:
        quoted = wanted_texts(item.prompt)
        once = {normalise(span, ignore_case): span for span in quoted}
        return [quoted, list(once.values())]
    texts = [text] if isinstance(text, str) else text
    return [[t for t in texts if t.strip()]]


def read_texts(reader: Reader, image: Image.Image, enlarge_to: int = 0) -> list[str]:
    """The lines that OCR reads, in its reading order."""
    image = image.convert("RGB")
    factor = enlarge_to / min(image.size)
    if factor > 1:
        image = image.resize([round(s * factor) for s in image.size], Image.BICUBIC)
    result = reader(np.asarray(image)[..., ::-1])  # BGR
    return list(result.txts or ())


def normalise(text: str, ignore_case: bool = True) -> str:
    """NFKC without white space, case-folded if case is ignored."""
    text = "".join(unicodedata.normalize("NFKC", text).split())
    return text.casefold() if ignore_case else text


def text_score(wanted: Sequence[str], found: Sequence[str], ignore_case: bool = True) -> float:
    """1 - min over orders of the spans of edit distance / wanted length, at least 0."""
    spans = [normalise(span, ignore_case) for span in wanted]
    read = "".join(normalise(f, ignore_case) for f in found)
    if len(spans) <= _ALL_ORDERS:
        orders = ["".join(order) for order in permutations(spans)]
    else:
        orders = ["".join(sorted(spans, key=lambda s: _place(s, read)))]
    distance = min(Levenshtein.distance(order, read) for order in orders)
    return max(0.0, 1 - distance / len(orders[0]))


def _place(span: str, read: str) -> int:
    """Where in the read text the span fits best."""
    alignment = fuzz.partial_ratio_alignment(span, read)
    return alignment.dest_start if alignment else 0
