"""BRISQUE: quality without a reference, from how natural the local contrasts are.

Mittal, Moorthy and Bovik, "No-Reference Image Quality Assessment in the Spatial
Domain", IEEE TIP 2012. The support vector regressor in weights/brisque.npz was
trained on the LIVE database; see weights/brisque.LICENSE.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import correlate1d
from scipy.special import gamma

from duet.rewards.base import RewardInput

Array = NDArray[np.float64]

# The regressor's own conventions: what it was trained on.
GREY = np.array([0.2125, 0.7154, 0.0721])  # ITU-R BT.709
_WINDOW = np.exp(-0.5 * (np.arange(-3, 4) / (7 / 6)) ** 2)
_WINDOW /= _WINDOW.sum()
_HALVE = np.array([-0.09375, 0.59375, 0.59375, -0.09375])  # cubic, a = -0.75, between pixels
_SHAPES = np.arange(0.2, 10, 0.001)
_RATIOS = gamma(2 / _SHAPES) ** 2 / (gamma(1 / _SHAPES) * gamma(3 / _SHAPES))
_ROUNDING = 1e-6  # contrasts below it are the rounding of a flat area


class Brisque:
    """1 - BRISQUE / 100 in [0, 1]: 1 is pristine, 0 is LIVE's worst; beyond is cut off.

    It knows photographs: on flat drawings its order is not to be trusted. A picture
    with no contrast in some direction (a flat one) has no statistics and scores NaN.
    """

    def load(self) -> None:
        _regressor()

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        return [float(np.clip(1 - brisque(i.image) / 100, 0, 1)) for i in inputs]


def brisque(image: Image.Image) -> float:
    """The paper's score, about 0 (best) to 100 (worst); NaN where a fit has no samples."""
    svr = _regressor()
    scaled = 2 * (features(image) - svr["low"]) / (svr["high"] - svr["low"]) - 1
    distances = np.square(svr["vectors"] - scaled).sum(1)
    return float(svr["coefficients"] @ np.exp(-svr["gamma"] * distances) - svr["rho"])


def features(image: Image.Image) -> Array:
    """36 features: 18 of the picture and 18 of it at half size."""
    grey = np.asarray(image.convert("RGB"), dtype=float) @ GREY
    return np.concatenate([_statistics(grey), _statistics(_half(grey))])


@cache
def _regressor() -> dict[str, Array]:
    with np.load(Path(__file__).parent / "weights" / "brisque.npz") as file:
        return {key: file[key].astype(float) for key in file.files}


def _half(grey: Array) -> Array:
    for axis in (0, 1):
        # the taps straddle pixels 2i and 2i + 1, so the filter is centred one pixel later
        grey = correlate1d(grey, _HALVE, axis, mode="nearest", origin=-1)
        grey = grey.take(range(0, grey.shape[axis] // 2 * 2, 2), axis)
    return grey


def _statistics(grey: Array) -> Array:
    """18 features of one scale: of the contrasts, and of their products with 4 neighbours."""
    x = contrasts(grey)
    pairs = [
        x[:, :-1] * x[:, 1:],
        x[:-1] * x[1:],
        x[:-1, :-1] * x[1:, 1:],
        x[1:, :-1] * x[:-1, 1:],
    ]
    shape, left, right, _ = _fit(x)
    return np.array([shape, (left + right) / 2, *(f for p in pairs for f in _pair(p))])


def contrasts(grey: Array) -> Array:
    """Mean-subtracted, contrast-normalised pixels (the paper's MSCN), equation 1."""
    mean = _smooth(grey)
    deviation = np.sqrt(np.abs(_smooth(grey**2) - mean**2))
    x = (grey - mean) / (deviation + 1)
    return np.where(np.abs(x) < _ROUNDING, 0, x)


def _smooth(grey: Array) -> Array:
    for axis in (0, 1):
        grey = correlate1d(grey, _WINDOW, axis, mode="constant")
    return grey


def _pair(products: Array) -> tuple[float, float, float, float]:
    shape, left, right, mean = _fit(products)
    return shape, mean, left, right


def _fit(x: Array) -> tuple[float, float, float, float]:
    """Asymmetric generalised Gaussian by moments: shape, both variances, mean.

    Lasmar, Stitou and Berthoumieu, ICIP 2009. All NaN where a side has no samples.
    """
    negative, positive = x[x < 0], x[x > 0]
    if not negative.size or not positive.size:
        return (float("nan"),) * 4
    left, right = np.square(negative).mean(), np.square(positive).mean()
    skew = np.sqrt(left / right)
    ratio = np.abs(x).mean() ** 2 / np.square(x).mean()
    ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = float(np.interp(ratio, _RATIOS, _SHAPES))
    mean = (np.sqrt(right) - np.sqrt(left)) * gamma(2 / shape)
    mean /= np.sqrt(gamma(1 / shape) * gamma(3 / shape))
    return shape, float(left), float(right), float(mean)
