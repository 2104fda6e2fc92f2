"""The card's pictures by name, and damage to any picture step by step."""

from PIL import Image

from duet.train.tiny.specimens import blurred, compressed, noisy, specimens

PICTURES = dict(specimens())
CLEAN = PICTURES["clean"]
DAMAGE = {
    "blur": (blurred, (1, 2, 3)),
    "noise": (noisy, (25, 50, 80)),
    "jpeg": (compressed, (60, 30, 5)),
}


def damaged(picture: Image.Image, kind: str) -> list[Image.Image]:
    """The picture itself, then ever stronger damage to it."""
    damage, strengths = DAMAGE[kind]
    return [picture, *(damage(picture, s) for s in strengths)]
