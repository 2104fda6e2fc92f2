"""Two measures of the tiny world that no training reward uses."""

from collections.abc import Sequence

from rewards.base import RewardInput
from rewards.ocr import Ocr
from train.tiny.world import Card, colour_obedience


class ColourObedience:
    """The share of a card's colour words that the pixels obey; NaN without a `card`."""

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [
            colour_obedience(i.image, Card.from_row(i.row["card"])) if "card" in i.row else float("nan")
            for i in inputs
        ]


class ExactWord:
    """1 where OCR reads exactly the wanted text, else 0."""

    def __init__(self, **ocr_args) -> None:
        self.ocr = Ocr(**ocr_args)

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [s if s != s else float(s == 1.0) for s in self.ocr(inputs)]
