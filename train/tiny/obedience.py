"""A measure of the tiny world that no training reward uses."""

from collections.abc import Sequence

from duet.rewards.base import RewardInput
from duet.train.tiny.world import Card, colour_obedience


class ColourObedience:
    """The share of a card's colour words that the pixels obey; NaN without a `card`."""

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [
            colour_obedience(i.image, Card.from_row(i.row["card"]))
            if "card" in i.row
            else float("nan")
            for i in inputs
        ]
