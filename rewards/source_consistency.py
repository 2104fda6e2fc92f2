"""Source consistency of an edit: what the prompt does not change stays."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from duet.configs.errors import UserError
from duet.rewards.base import RewardInput
from duet.rewards.clip import ClipReward, batches


class SourceConsistency(ClipReward):
    """Nearness of an edit to the row's `source`, in [0, 1]; 1 for the source itself.

    The mean of what is kept and of identity. Kept: the features of picture and source
    are compared patch by patch in every stage of the image tower; the `changed_share`
    of patches that differ most may be what the prompt asked for and is left out (a
    trimmed mean), so a local edit costs little and a change everywhere costs in full.
    Identity: cosine of the two image embeddings, which see the whole picture. It
    does not apply to a row without `source`.

    The source unchanged scores best: train it together with a reward for the edit.
    """

    def __init__(self, changed_share: float = 0.25, **clip: Any) -> None:
        super().__init__(**clip)
        if not 0 <= changed_share < 1:
            raise UserError(f"changed_share {changed_share}: give a share >= 0 and < 1")
        self.changed_share = changed_share

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float | None]:
        sources = [item.picture("source") for item in inputs]
        pairs = [(i.image, s) for i, s in zip(inputs, sources, strict=True) if s]
        scores = iter(s for part in batches(pairs, self.clip.batch_size) for s in self._score(part))
        return [None if source is None else next(scores) for source in sources]

    def _score(self, pairs: Sequence[tuple[Image.Image, Image.Image]]) -> list[float]:
        images, sources = zip(*pairs, strict=True)
        stages = zip(self.clip.stages(images), self.clip.stages(sources), strict=True)
        kept = torch.stack([kept_share(a, b, self.changed_share) for a, b in stages]).mean(0)
        embeddings = self.clip.embed_images(images), self.clip.embed_images(sources)
        identity = (embeddings[0] * embeddings[1]).sum(-1).clamp(0, 1)
        return ((kept + identity) / 2).tolist()


def kept_share(a: Tensor, b: Tensor, changed_share: float) -> Tensor:
    """Mean cosine [B] of the most alike patches of channel-normalised features [B, C, H, W]."""
    cosines = (a * b).sum(1).flatten(1).clamp(0, 1)  # [B, H * W]
    count = max(1, round(cosines.shape[1] * (1 - changed_share)))
    return cosines.topk(count).values.mean(1)
