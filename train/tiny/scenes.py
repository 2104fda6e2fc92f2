"""Cards in a drawing style, or with an emblem: what edits start from and lead to.

`plain` is the card as captions have it. `outline` draws a shape's edge around white, `striped`
puts light stripes on the background, `night` darkens it and makes every word white.
"""

import random
from dataclasses import asdict, dataclass

from PIL import Image

from duet.train.tiny.drawing import Canvas, Colour, shape_box
from duet.train.tiny.world import PALETTE, PLACES, TEXT_COLOURS, Card, held_out

PLAIN = "plain"
STYLES = ("outline", "striped", "night")
_STRIPE_PIXELS = 4  # eight a pair: a latent's height
_WHITE = TEXT_COLOURS["white"]


@dataclass(frozen=True)
class Emblem:
    """Two by two coloured cells, row by row, in the middle of a block."""

    cells: tuple[str, str, str, str]
    place: str


@dataclass(frozen=True)
class Scene:
    card: Card
    style: str = PLAIN
    emblem: Emblem | None = None

    @classmethod
    def from_row(cls, row: dict) -> "Scene":
        emblem = row["emblem"] and Emblem(tuple(row["emblem"]["cells"]), row["emblem"]["place"])
        return cls(Card.from_row(row["card"]), row["style"], emblem)

    def to_row(self) -> dict:
        return asdict(self)


def is_held_out_emblem(cells: tuple[str, ...]) -> bool:
    return held_out(f"emblem {'/'.join(cells)}")


def sample_cells(rng: random.Random, besides: set[str], of_held_out: bool = False):
    """Four colours, three different ones at least, none of `besides`."""
    colours = [c for c in PALETTE if c not in besides]
    while True:
        cells = tuple(rng.choices(colours, k=4))
        if len(set(cells)) >= 3 and is_held_out_emblem(cells) == of_held_out:
            return cells


def draw_scene(scene: Scene, scale: float = 1.0) -> Image.Image:
    """Render in RGB, `scale` times 64 x 96 pixels; a plain card as `world.draw` does."""
    card, night = scene.card, scene.style == "night"
    ground = PALETTE[card.background]
    canvas = Canvas(_mixed(ground, (0, 0, 0), 0.65) if night else ground, scale)
    if scene.style == "striped":
        canvas.stripes(_mixed(ground, _WHITE, 0.6), _STRIPE_PIXELS)
    inside = _WHITE if scene.style == "outline" else None
    for shape in card.shapes:
        canvas.shape(shape.kind, PLACES[shape.place], PALETTE[shape.colour], inside)
    if scene.emblem:
        cells = tuple(PALETTE[c] for c in scene.emblem.cells)
        canvas.cells(PLACES[scene.emblem.place], cells)
    canvas.word(card.word, _WHITE if night else TEXT_COLOURS[card.text_colour])
    return canvas.picture()


def box_in_block(place: str) -> list[int]:
    """Left, top, right and bottom in pixels of the shape or emblem that stands there."""
    return [round(v) for v in shape_box(PLACES[place])]


def _mixed(colour: Colour, other: Colour, share: float) -> Colour:
    return tuple(round((1 - share) * a + share * b) for a, b in zip(colour, other, strict=True))
