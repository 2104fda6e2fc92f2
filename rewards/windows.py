"""Windows of a picture, and where to look first for something in it."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from duet.rewards.colour import lab

_SIZES = (0.5, 0.7, 1.0, 1.4, 2.0)
_TEMPLATE = 12  # pixels of its longer side


@dataclass(frozen=True)
class Window:
    """In pixels, and parts of them."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def sides(self) -> tuple[float, float, float, float]:
        return self.left, self.top, self.right, self.bottom

    def of(self, picture: Image.Image) -> Image.Image:
        """Square, whatever its shape: towers would cut off the ends of a long one."""
        side = max(1, round(max(self.right - self.left, self.bottom - self.top)))
        return picture.resize((side, side), Image.Resampling.BICUBIC, box=self.sides)

    def neighbours(self, size: tuple[int, int], step: float, growth: float) -> list["Window"]:
        """Moved by a share of its sides, and of other sizes, all within the picture."""
        width, height = self.right - self.left, self.bottom - self.top
        x, y = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        return [
            _around(x + i * step * width, y + j * step * height, (width * s, height * s), size)
            for s in (1 / growth, 1.0, growth)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        ]


def grid(size: tuple[int, int], sides: tuple[float, float]) -> list[Window]:
    """Windows half a window apart that reach every edge of the picture."""
    width, height = _within(sides, size)
    lefts, tops = (_places(whole, part) for whole, part in zip(size, (width, height), strict=True))
    return [_around(x + width / 2, y + height / 2, sides, size) for y in tops for x in lefts]


def _places(whole: float, part: float) -> list[float]:
    count = max(1, -int(-(whole - part) // (part / 2)) + 1)
    return [(whole - part) * i / max(1, count - 1) for i in range(count)]


def _around(x: float, y: float, sides: tuple[float, float], size: tuple[int, int]) -> Window:
    """The window with its centre there, or as near as the picture lets it be."""
    width, height = _within(sides, size)
    left = min(max(x - width / 2, 0), size[0] - width)
    top = min(max(y - height / 2, 0), size[1] - height)
    left, top = round(left, 2), round(top, 2)
    return Window(left, top, min(left + width, size[0]), min(top + height, size[1]))


def _within(sides: tuple[float, float], size: tuple[int, int]) -> tuple[float, float]:
    """In the same proportions, no larger than the picture, and no smaller than a pixel."""
    shrunk = min(1.0, *(whole / side for whole, side in zip(size, sides, strict=True)))
    width, height = (max(1.0, round(side * shrunk, 2)) for side in sides)
    return min(width, size[0]), min(height, size[1])


def fitting(image: Image.Image, subject: Image.Image, sides: tuple[float, float]) -> list[Window]:
    """Where `subject` of that width and height differs least in colour: a window for each of five
    sizes, from half to twice as large.

    Template matching: the least mean square of the difference in CIE L*a*b*, at a resolution that
    shows the subject with 12 pixels.
    """
    found = []
    for factor in _SIZES:
        width, height = _within((sides[0] * factor, sides[1] * factor), image.size)
        shrink = min(1.0, _TEMPLATE / max(width, height))
        small = image.resize([max(1, round(side * shrink)) for side in image.size])
        across, down = (max(1, round(side * shrink)) for side in (width, height))
        across, down = min(across, small.width), min(down, small.height)
        differences = _differences(_tensor(small), _tensor(subject.resize((across, down))))
        row, column = divmod(int(differences.argmin()), differences.shape[1])
        x = (column + across / 2) * image.width / small.width
        y = (row + down / 2) * image.height / small.height
        found.append(_around(x, y, (width, height), image.size))
    return found


def _tensor(picture: Image.Image) -> Tensor:
    """[3, H, W]"""
    return torch.from_numpy(np.moveaxis(lab(picture), -1, 0).copy())


def _differences(picture: Tensor, part: Tensor) -> Tensor:
    """Sum of the squared difference of `part` and each window of its size."""
    squares = F.conv2d(picture[None].square(), torch.ones_like(part)[None])
    products = F.conv2d(picture[None], part[None])
    return (squares - 2 * products + part.square().sum())[0, 0]
