"""Style: the statistics of a picture's features, wherever in it they stand.

Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural Networks", CVPR 2016; in
grey, as in Gatys et al., "Preserving Color in Neural Artistic Style Transfer", arXiv 1606.05897.
"""

from collections.abc import Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor

from duet.rewards.base import RewardInput
from duet.rewards.clip import ClipReward, batches


class Style(ClipReward):
    """Likeness of the picture's style to the row's `style`, in [0, 1]; 1 for that picture itself.

    `style` is a picture, or the place of one among the row's sources, counted from 0. A style is
    the Gram matrix of the features of every stage of the image tower: which occur together, not
    where. The score is the mean over stages of 1 - |A - B| / (|A| + |B|), in Frobenius's norm.
    Features are of length 1 at each place, so that no stage counts for its size, and a picture
    counts together with its mirror image. Half of the score is that of the pictures in grey:
    colours are part of a style, but what is drawn has colours of its own.

    It does not apply to a row without `style`.
    """

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float | None]:
        styles = [item.picture("style") for item in inputs]
        pairs = [(i.image, s) for i, s in zip(inputs, styles, strict=True) if s]
        scores = iter(s for part in batches(pairs, self.clip.batch_size) for s in self._score(part))
        return [None if style is None else next(scores) for style in styles]

    def _score(self, pairs: Sequence[tuple[Image.Image, Image.Image]]) -> list[float]:
        ours, theirs = (self._grams(side) for side in zip(*pairs, strict=True))
        stages = [1 - _distance(a, b) for a, b in zip(ours, theirs, strict=True)]
        return torch.stack(stages).mean(0).tolist()

    def _grams(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """[B, C, C] of every stage in colour, then of every stage in grey."""
        grams = []
        for seen in (pictures, [picture.convert("L") for picture in pictures]):
            mirrored = [ImageOps.mirror(picture) for picture in seen]
            both = zip(self.clip.stages(seen), self.clip.stages(mirrored), strict=True)
            grams += [(gram(a) + gram(b)) / 2 for a, b in both]
        return grams


def gram(features: Tensor) -> Tensor:
    """Mean over places of the products of features [B, C, H, W]: [B, C, C]."""
    flat = features.flatten(2)
    return flat @ flat.mT / flat.shape[-1]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """[B] in [0, 1]: as norms, no less than the difference of the two."""
    return (a - b).flatten(1).norm(dim=1) / (a.flatten(1).norm(dim=1) + b.flatten(1).norm(dim=1))
