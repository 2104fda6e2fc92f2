"""Measures of the tiny world that no training reward uses."""

from collections.abc import Sequence

from duet.rewards.base import RewardInput
from duet.train.tiny.edit_measure import EditScore, measure_edit
from duet.train.tiny.scenes import Scene
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


class EditSuccess:
    """1 where the asked change is there and the rest has stayed, else 0; None without an `edit`."""

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float | None]:
        return [score and score.success for score in map(_measured, inputs)]


class EditKept:
    """The share of what the prompt does not speak of that has stayed; None without an `edit`."""

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float | None]:
        return [score and score.kept for score in map(_measured, inputs)]


def _measured(item: RewardInput) -> EditScore | None:
    if "edit" not in item.row:
        return None
    edit = item.row["edit"]
    return measure_edit(item.image, Scene.from_row(edit["wanted"]), tuple(edit["asked"]))
