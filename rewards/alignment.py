"""Semantic alignment: CLIP score (Hessel et al., arXiv 2104.08718) without its rescaling."""

from collections.abc import Sequence

from duet.rewards.base import RewardInput
from duet.rewards.clip import ClipReward


class Alignment(ClipReward):
    """Cosine of image and prompt embeddings, in [-1, 1]."""

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        images = self.clip.embed_images([i.image for i in inputs])
        texts = self.clip.embed_texts([i.prompt for i in inputs])
        return (images * texts).sum(-1).tolist()
