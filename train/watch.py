"""Against reward hacking: rewards that are watched and never trained on, and an alarm.

Also what optimised pictures drift in: sharpness, saturation, and their diversity
within a group.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image
from scipy.ndimage import laplace

from duet.configs.schema import WatchConfig

_THUMBNAIL = (32, 32)  # pixels; two pictures differ when their thumbnails do


class Watch:
    """Compares the last `window` steps with the first ones.

    The alarm rings when the trained reward has risen while a watched one has lost
    more than `drop` of its first mean (Goodhart's law; Gao et al., arXiv 2210.10760).
    """

    def __init__(self, config: WatchConfig, history: Sequence[Mapping[str, float]] = ()) -> None:
        """`history`: the metrics of the steps before, for a run that is resumed."""
        self.config = config
        self.steps = list(history)

    def __call__(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics of this step: the drift of each watched value, and `watch/alarm`, 0 or 1."""
        self.steps.append(metrics)
        drift = {f"drift/{name}": self._change(name) for name in _DRIFTING}
        lost = {
            reward.metric_name: -self._change(f"watch/{reward.metric_name}/mean")
            for reward in self.config.rewards
        }
        drift |= {f"watch/{name}/lost": share for name, share in lost.items()}
        rang = self._change("reward") > 0 and any(v > self.config.drop for v in lost.values())
        return drift | {"watch/alarm": float(rang)}

    def alarm_text(self, metrics: Mapping[str, float]) -> str:
        """What rang, in one line."""
        lost = ", ".join(
            f"{r.metric_name} lost {metrics[f'watch/{r.metric_name}/lost']:.0%}"
            for r in self.config.rewards
        )
        return f"the trained reward rose by {self._change('reward'):.0%} while {lost}"

    def _change(self, name: str) -> float:
        """(last - first) / |first|, means over `window` steps; 0 until both are full."""
        told = (m.get(name) for m in self.steps)
        values = [v for v in told if v is not None and not math.isnan(v)]
        window = self.config.window
        if len(values) < 2 * window:
            return 0.0
        first, last = np.mean(values[:window]), np.mean(values[-window:])
        return float((last - first) / max(abs(first), 1e-6))


_DRIFTING = ("images/sharpness", "images/saturation", "images/diversity")


@dataclass(frozen=True)
class Look:
    """What of a picture tells how pictures drift."""

    sharpness: float
    saturation: float  # HSV's, in [0, 1]
    thumbnail: np.ndarray  # uint8 [h, w, 3]

    @classmethod
    def of(cls, image: Image.Image) -> "Look":
        saturation = np.asarray(image.convert("HSV"))[..., 1].mean() / 255
        thumbnail = np.asarray(image.resize(_THUMBNAIL, Image.BOX))
        return cls(sharpness(image), float(saturation), thumbnail)


def image_metrics(looks: Sequence[Look], groups: Sequence[int]) -> dict[str, float]:
    """Means over pictures (sharpness, saturation) and over groups (diversity); `groups`: whose
    each picture is.

    Diversity: root mean square difference of two thumbnails of a group, in [0, 1].
    """
    small: dict[int, list[np.ndarray]] = {}
    for look, group in zip(looks, groups, strict=True):
        small.setdefault(group, []).append(look.thumbnail.astype(float) / 255)
    diversity = [
        np.mean([np.sqrt(np.square(a - b).mean()) for a, b in combinations(own, 2)])
        for own in small.values()
    ]
    sharp, saturation = [look.sharpness for look in looks], [look.saturation for look in looks]
    named = zip(_DRIFTING, (sharp, saturation, diversity), strict=True)
    return {name: float(np.mean(values)) for name, values in named}


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of the grey picture in [0, 1]."""
    return float(laplace(np.asarray(image.convert("L"), dtype=float) / 255).var())
