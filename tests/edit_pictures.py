"""Drawn cards as edits make them: emblems, drawing styles, rows of an edit."""

import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from duet.train.tiny.world import PALETTE, Card, draw, sample_card

EMBLEM_PIXELS = 22


def card(seed: int) -> Image.Image:
    return draw(sample_card(random.Random(seed)))


def emblem(*colours: str) -> Image.Image:
    """Two by two cells, row by row."""
    picture, side = Image.new("RGB", (EMBLEM_PIXELS, EMBLEM_PIXELS)), EMBLEM_PIXELS // 2
    pen = ImageDraw.Draw(picture)
    for i, colour in enumerate(colours):
        x, y = i % 2 * side, i // 2 * side
        pen.rectangle((x, y, x + side - 1, y + side - 1), fill=PALETTE[colour])
    return picture


def plain(background: str = "red", word: str = "CHAP") -> Image.Image:
    return draw(Card(background, (), "white", word))


def put(picture: Image.Image, part: Image.Image, x: int, y: int) -> Image.Image:
    made = picture.copy()
    made.paste(part, (x, y))
    return made


def box_at(x: int, y: int) -> list[int]:
    """Of an emblem."""
    return [x, y, x + EMBLEM_PIXELS, y + EMBLEM_PIXELS]


def outlined(picture: Image.Image) -> Image.Image:
    """Black edges on white."""
    edges = picture.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda v: 255 * (v > 20))
    inner = Image.new("L", picture.size)
    inner.paste(edges.crop((1, 1, *(side - 1 for side in edges.size))), (1, 1))
    return ImageOps.invert(inner).convert("RGB")


def striped(picture: Image.Image) -> Image.Image:
    """Light stripes on the ground, four pixels high."""
    pixels = np.asarray(picture, dtype=float).copy()
    ground = np.abs(pixels - pixels[0, 0]).sum(-1) < 30
    light = ground & (np.arange(picture.height) // 4 % 2 == 0)[:, None]
    pixels[light] = 0.6 * pixels[light] + 102
    return Image.fromarray(pixels.astype(np.uint8))


def at_night(picture: Image.Image) -> Image.Image:
    pixels = np.asarray(picture, dtype=float) * [0.25, 0.3, 0.6] + [5, 5, 40]
    return Image.fromarray(pixels.astype(np.uint8))


STYLES = {"plain": lambda picture: picture, "outline": outlined, "stripes": striped, "night": at_night}  # fmt: skip


def shuffled(picture: Image.Image, seed: int) -> Image.Image:
    """Its six blocks of 32 pixels in another order."""
    corners = [(x, y) for y in (0, 32) for x in (0, 32, 64)]
    places = random.Random(seed).sample(corners, len(corners))
    made = picture.copy()
    for (x, y), place in zip(corners, places, strict=True):
        made.paste(picture.crop((x, y, x + 32, y + 32)), place)
    return made
