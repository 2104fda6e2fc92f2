"""Diversity: how far a sample is from the others of its prompt."""

from collections.abc import Sequence

from duet.rewards.base import RewardInput
from duet.rewards.clip import ClipReward


class Diversity(ClipReward):
    """1 - mean cosine of the image's embedding with those of its group's others, in [0, 2].

    0 for a group of one picture over and over. It does not apply to a sample alone.
    Weigh it below a reward that asks for what is wanted: noise is diverse too.
    """

    whole_groups = True

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float | None]:
        others = len(inputs) - 1
        if others == 0:
            return [None]
        embeddings = self.clip.embed_images([i.image for i in inputs])
        cosines = embeddings @ embeddings.T  # [G, G]
        return (1 - (cosines.sum(1) - cosines.diagonal()) / others).tolist()
