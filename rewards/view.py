"""The low-frequency and the high-frequency part of a picture, for any reward.

An AR reward that sees `low` cannot be paid for decoder noise; a decoder reward that
sees `high` cannot be paid for composition.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from duet.rewards.base import Reward, RewardInput

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


class Viewed:
    """A reward that sees every picture through a view: the mean of its scores of each look."""

    def __init__(self, reward: Reward, view: str) -> None:
        self.reward, self.looks = reward, VIEWS[view]
        self.whole_groups = getattr(reward, "whole_groups", False)

    def load(self) -> None:
        if hasattr(self.reward, "load"):
            self.reward.load()

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        scores = []
        for look in self.looks:
            seen = [replace(i, image=look(i.image), look=look, size=i.image.size) for i in inputs]
            answer = list(self.reward(seen))
            if len(answer) != len(inputs):
                return answer  # the caller's check tells the count
            scores.append(answer)
        return np.mean(np.array(scores, dtype=float), axis=0).tolist()
