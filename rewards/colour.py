"""Colour differences as eyes see them: CIE L*a*b* (CIE 15:2004) of sRGB (IEC 61966-2-1)."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_WHITE = _TO_XYZ.sum(1)  # D65
_KNEE = 6 / 29


def lab(image: Image.Image) -> NDArray[np.float64]:
    """L* in 0 to 100, a* and b* about -128 to 127: [H, W, 3]."""
    srgb = np.asarray(image.convert("RGB"), dtype=float) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    x, y, z = np.moveaxis(
        np.where(xyz > _KNEE**3, np.cbrt(xyz), xyz / (3 * _KNEE**2) + 4 / 29), -1, 0
    )
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def colour_difference(a: Image.Image, b: Image.Image) -> NDArray[np.float64]:
    """CIE 1976 delta E of each pixel, [H, W]: about 2.3 is just noticed, black to white is 100."""
    return np.sqrt(np.square(lab(a) - lab(b)).sum(-1))
