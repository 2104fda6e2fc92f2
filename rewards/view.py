"""The low-frequency and the high-frequency part of a picture, for any reward.

An AR reward that sees `low` cannot be paid for decoder noise; a decoder reward that
sees `high` cannot be paid for composition.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from duet.rewards.answers import Answer, read_answers
from duet.rewards.base import Reward, RewardInput, own_copies

LOW_FACTOR = 8  # one pixel for each latent cell: what is finer is the decoder's


def low(image: Image.Image) -> Image.Image:
    """The picture at an eighth of its sides, each pixel the mean of its block."""
    width, height = (max(1, side // LOW_FACTOR) for side in image.size)
    return image.resize((width, height), Image.BOX)


def crop(image: Image.Image, column: int, row: int) -> Image.Image:
    """One quarter of the picture at full resolution."""
    width, height = (side // 2 for side in image.size)
    return image.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


VIEWS: dict[str, tuple[Callable[[Image.Image], Image.Image], ...]] = {
    "low": (low,),
    "high": tuple(partial(crop, column=c, row=r) for r in (0, 1) for c in (0, 1)),
}
_SCALES = {"low": low}  # what is shown whole has the resolution of the looks


class Viewed:
    """A reward that sees every picture through a view: the mean of its scores of each look."""

    def __init__(self, reward: Reward, view: str) -> None:
        self.reward, self.looks = reward, VIEWS[view]
        self.own = {"scale": _SCALES[view]} if view in _SCALES else {}

    def __getattr__(self, name: str) -> Any:
        """What is optional in a reward is the viewed one's: `load`, `whole_groups`, `to`, ..."""
        return getattr(self.reward, name)

    def __call__(self, inputs: Sequence[RewardInput]) -> list[Answer]:
        answers = []
        for look in self.looks:
            seen = [
                replace(i, image=look(i.image), look=look, size=i.image.size, **self.own)
                for i in own_copies(inputs)
            ]
            answers.append(read_answers(self.reward(seen), len(inputs)))
        return [_mean(sample) for sample in zip(*answers, strict=True)]


def _mean(answers: Sequence[Answer]) -> Answer:
    """Of the looks that the reward applies to; NaN where one of them failed."""
    given = [answer for answer in answers if answer is not None]
    return float(np.mean(given)) if given else None
