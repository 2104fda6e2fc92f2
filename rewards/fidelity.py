"""Detail fidelity: nearness to a reference picture, or quality without one."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, sobel, uniform_filter

from duet.rewards.base import RewardInput
from duet.rewards.clip import Clip, ClipReward, batches

# scikit-image's and libjpeg's grey weights (ITU-R BT.601)
_GREY = np.array([0.299, 0.587, 0.114])


class Fidelity(ClipReward):
    """1 - LPIPS-form distance to the row's `image`; without one, `quality` in [0, 1].

    1 for the reference itself; what shares nothing with it falls below 0.
    """

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        references = [item.picture("image") for item in inputs]
        paired = [i for i, reference in enumerate(references) if reference]
        distances = feature_distance(
            self.clip, [inputs[i].image for i in paired], [references[i] for i in paired]
        )
        scores = {i: 1 - d for i, d in zip(paired, distances, strict=True)}
        return [scores[i] if i in scores else quality(x.image) for i, x in enumerate(inputs)]


def feature_distance(
    clip: Clip, images: Sequence[Image.Image], references: Sequence[Image.Image]
) -> list[float]:
    """LPIPS's form (Zhang et al., arXiv 1801.03924) with equal weights.

    Channel-normalised features of every stage, squared difference summed over
    channels, averaged over places, then over stages.
    """
    pairs = list(zip(images, references, strict=True))
    distances = []
    for part in batches(pairs, clip.batch_size):
        ours, theirs = (clip.stages(side) for side in zip(*part, strict=True))
        stages = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(ours, theirs, strict=True)]
        distances += torch.stack(stages).mean(0).tolist()
    return distances


def quality(image: Image.Image) -> float:
    """No-reference quality in [0, 1]: sharp edges that run in a direction.

    Coherence of the structure tensor, weighted by energy ((s1 - s2) / (s1 + s2) of
    Zhu and Milanfar's Metric Q, 2010), less what noise has by chance; times the
    share of gradient that a blur takes away (Crete et al., 2007). Noise has no
    direction, blur has nothing to lose, a flat picture has neither.
    """
    grey = np.asarray(image.convert("RGB"), dtype=float) @ _GREY / 255
    across, down = sobel(grey, 1) / 4, sobel(grey, 0) / 4
    xx, yy, xy = (uniform_filter(p, 7) for p in (across**2, down**2, across * down))
    energy = xx + yy  # s1^2 + s2^2
    difference = np.sqrt((xx - yy) ** 2 + 4 * xy**2)  # s1^2 - s2^2
    coherence = difference.sum() / (energy.sum() + _FAINT * energy.size)
    coherence = max(0.0, coherence - _CHANCE) / (1 - _CHANCE)
    strength = np.hypot(across, down)
    blurred = gaussian_filter(grey, 2)
    kept = np.hypot(sobel(blurred, 1) / 4, sobel(blurred, 0) / 4)
    lost = np.clip(strength - kept, 0, None).sum() / (strength.sum() + _FAINT * strength.size)
    return float(coherence * lost)


_CHANCE = 0.35  # coherence that white noise reaches in a window of 7 pixels, rounded up
_FAINT = 1e-4  # gradient energy below which a picture counts as flat
