"""Parts of a picture: boxes in its pixels, and masks."""

from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from duet.configs.errors import UserError
from duet.configs.setting import shown

WHITE = 255
_HALF = 128


@dataclass(frozen=True)
class Box:
    """In whole pixels from the upper left; right and bottom are the first ones beyond it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def sides(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.right, self.bottom

    def resized(self, old: tuple[int, int], new: tuple[int, int]) -> "Box":
        """In a picture that was resampled from width and height `old` to `new`; never empty."""
        (width, height), (new_width, new_height) = old, new
        return Box(
            self.left * new_width // width,
            self.top * new_height // height,
            -(-self.right * new_width // width),
            -(-self.bottom * new_height // height),
        )


def read_box(name: str, value: Any, size: tuple[int, int]) -> Box:
    """Raises UserError for anything but [left, top, right, bottom] within width and height."""
    whole = isinstance(value, list | tuple) and all(type(side) is int for side in value)
    if not whole or len(value) != 4:
        raise UserError(
            f"{name} = {shown(value)} must be a box [left, top, right, bottom] of whole numbers, "
            "in pixels"
        )
    box, (width, height) = Box(*value), size
    if box.left >= box.right or box.top >= box.bottom:
        raise UserError(f"{name} = {shown(value)} is empty: left < right and top < bottom")
    if box.left < 0 or box.top < 0 or box.right > width or box.bottom > height:
        raise UserError(
            f"{name} = {shown(value)} reaches out of its picture of {width} x {height} pixels"
        )
    return box


def mask_of_boxes(boxes: list[Box], size: tuple[int, int]) -> Image.Image:
    """Mode L of width and height `size`: white within any of the boxes, black elsewhere."""
    mask = Image.new("L", size)
    pen = ImageDraw.Draw(mask)
    for box in boxes:
        pen.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), fill=WHITE)
    return mask


def black_and_white(mask: Image.Image) -> Image.Image:
    """Mode L: white where it is at least half white, black elsewhere."""
    return mask.convert("L").point(lambda value: WHITE if value >= _HALF else 0)
