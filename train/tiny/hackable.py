"""A reward that is easily hacked, to see the alarm ring."""

from collections.abc import Sequence

from duet.rewards.base import RewardInput
from duet.train.watch import sharpness


class Sharpness:
    """Variance of the Laplacian: meant for focus, raised most cheaply by noise."""

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [sharpness(i.image) for i in inputs]
