"""Source consistency of an edit: what the prompt does not change stays."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from duet.configs.errors import UserError
from duet.rewards.base import RewardInput
from duet.rewards.clip import ClipReward, batches
from duet.rewards.colour import colour_difference

_SEEN = 25.0  # delta E at which `kept_exactly` has fallen to 1 / e


class SourceConsistency(ClipReward):
    """Nearness of an edit to its sources, in [0, 1]; 1 for the source itself.

    The first source is the one that is edited. Where the row has `keep`, the score is of what
    must stay alone, pixel by pixel (`kept_exactly`): what lies outside counts for nothing.

    Without it the score is the mean of what is kept and of identity. Kept: the features of picture
    and first source are compared patch by patch in every stage of the image tower; the
    `changed_share` of patches that differ most may be what the prompt asked for and is left out
    (a trimmed mean), so a local edit costs little and a change everywhere costs in full.
    Identity: cosine of the two image embeddings, which see the whole picture. What is taken from
    further sources has no place to be compared at: of them identity counts alone, and the score is
    the least over the sources. A mean would pay most for a copy of one of them.

    It does not apply to a row without sources, nor to a view that shows nothing of `keep`. The
    source unchanged scores best: train it together with a reward for the edit.
    """

    def __init__(self, changed_share: float = 0.25, **clip: Any) -> None:
        super().__init__(**clip)
        if not 0 <= changed_share < 1:
            raise UserError(f"changed_share {changed_share}: give a share >= 0 and < 1")
        self.changed_share = changed_share

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float | None]:
        scores: list[float | None] = [None] * len(inputs)
        whole = []
        for i, item in enumerate(inputs):
            source, keep = item.picture("source"), item.picture("keep")
            if source and keep:
                scores[i] = kept_exactly(item.image, source, keep)
            elif source:
                whole.append((i, item.image, source, item.sources[1:]))
        for part in batches(whole, self.clip.batch_size):
            places, images, firsts, further = zip(*part, strict=True)
            found = self._likeness(images, firsts, further)
            for i, score in zip(places, found, strict=True):
                scores[i] = score
        return scores

    def _likeness(
        self,
        images: Sequence[Image.Image],
        firsts: Sequence[Image.Image],
        further: Sequence[Sequence[Image.Image]],
    ) -> list[float]:
        """Of each image to its first source and to its further ones, the least."""
        stages = zip(self.clip.stages(images), self.clip.stages(firsts), strict=True)
        kept = torch.stack([kept_share(a, b, self.changed_share) for a, b in stages]).mean(0)
        embeddings = self.clip.embed_images(images)
        scores = (kept + _cosines(embeddings, self.clip.embed_images(firsts))) / 2
        owners = [i for i, pictures in enumerate(further) for _ in pictures]
        if owners:
            others = self.clip.embed_images([p for pictures in further for p in pictures])
            alike = _cosines(embeddings[owners], others)
            index = torch.tensor(owners, device=alike.device)
            scores = scores.scatter_reduce(0, index, alike, "amin")
        return scores.tolist()


def kept_exactly(image: Image.Image, source: Image.Image, keep: Image.Image) -> float | None:
    """exp(-d / 25), d the root mean square of the colour difference (CIE 1976 delta E) of `image`
    and `source` over the white pixels of `keep`, all of one size; None: it has none.

    The square lets a few pixels of another colour, a letter, outweigh an even trace of noise.
    """
    white = np.asarray(keep) > 0
    if not white.any():
        return None
    difference = colour_difference(image, source)[white]
    return math.exp(-math.sqrt(np.square(difference).mean()) / _SEEN)


def kept_share(a: Tensor, b: Tensor, changed_share: float) -> Tensor:
    """Mean cosine [B] of the most alike patches of channel-normalised features [B, C, H, W]."""
    cosines = (a * b).sum(1).flatten(1).clamp(0, 1)  # [B, H * W]
    count = max(1, round(cosines.shape[1] * (1 - changed_share)))
    return cosines.topk(count).values.mean(1)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of embeddings of length 1, [B]; opposite ones are no less alike than strangers."""
    return (a * b).sum(-1).clamp(0, 1)
