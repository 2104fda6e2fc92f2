"""Prompts longer than a text tower takes: split, and the pieces' embeddings averaged."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_BORDERS = (
    r"(?<=[.!?;])\s+|(?<=[。！？；])|\n",
    r"(?<=,)\s+|(?<=[，、])",
    r"\s+",
)  # the best first


def pieces(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The text itself where it fits; else halves of it, of halves, until all fit.

    It is cut at the border of a sentence, of a clause or of a word that is nearest to its
    middle; in the middle of a word only where there is no other way.
    """
    if len(text) < 2 or fits(text):
        return [text]
    cut = _border(text)
    return [p for half in (text[:cut], text[cut:]) for p in pieces(half.strip(), fits)]


def _border(text: str) -> int:
    middle = len(text) / 2
    for border in _BORDERS:
        places = [m.end() for m in re.finditer(border, text)]
        near = [p for p in places if middle / 2 <= p <= middle * 3 / 2]
        if near:
            return min(near, key=lambda p: abs(p - middle))
    return len(text) // 2


def embed_long(
    texts: Sequence[str], fits: Callable[[str], bool], embed: Callable[[list[str]], Tensor]
) -> Tensor:
    """L2-normalised embeddings [B, D]; that of a split text is the mean of its pieces', rescaled.

    `embed`: texts that fit -> L2-normalised embeddings.
    """
    split = {text: pieces(text, fits) for text in dict.fromkeys(texts)}
    parts = [split[text] for text in texts]
    embedded = embed([piece for part in parts for piece in part])
    means = [
        e[0] if len(e) == 1 else F.normalize(e.mean(0), dim=-1)
        for e in embedded.split([len(part) for part in parts])
    ]
    return torch.stack(means)
