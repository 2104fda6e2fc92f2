"""The synthetic world of the tiny GLM-Image: captioned cards.

A card is 64 x 96 pixels: one background colour, up to two shapes in the upper
half (each in its own 32-pixel block) and a word of 3 to 5 capitals in the lower
half, letter i always centred in the 16-pixel slot i (one column of DiT tokens).

    a red card with a blue circle on the left and the white word "CAT"

A fifth of the words and nine of the thirty (background, shape) colour pairs are
held out by a hash and never occur in any training prompt. Pictures of held-out
pairs do occur in pretraining, under captions that leave one colour of the pair
unsaid: what is held out is the combination of words, not a paint.
"""

import hashlib
import random
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image

from duet.train.tiny.drawing import BLOCK_PIXELS, HEIGHT_PIXELS, WIDTH_PIXELS, Canvas

ALPHABET = "ACEHLNOPTX"  # narrow capitals that OCR does not mistake for each other
WORD_LENGTHS = (3, 4, 5)
PALETTE = {
    "red": (200, 40, 40),
    "green": (30, 140, 60),
    "blue": (30, 70, 220),
    "purple": (150, 40, 170),
    "orange": (230, 130, 30),
    "teal": (20, 170, 180),
}
TEXT_COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}
PLACES = {"on the left": 0, "in the middle": 1, "on the right": 2}
SHAPES = ("circle", "square", "triangle")


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    place: str


@dataclass(frozen=True)
class Card:
    background: str
    shapes: tuple[Shape, ...]
    text_colour: str
    word: str

    @property
    def prompt(self) -> str:
        return self.caption()

    def caption(self, background: bool = True, shapes: bool = True) -> str:
        """The card in words; either kind of colour may be left unsaid."""
        parts = []
        for shape in self.shapes:
            named = f"{shape.colour} {shape.kind}" if shapes else shape.kind
            parts.append(f"{article(named)} {named} {shape.place}")
        parts.append(f'the {self.text_colour} word "{self.word}"')
        listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        card = f"{self.background} card" if background else "card"
        return f"{article(card)} {card} with {listed}"

    @property
    def has_held_out_pair(self) -> bool:
        return any(is_held_out_pair(self.background, s.colour) for s in self.shapes)

    @property
    def colours(self) -> tuple[str, ...]:
        return (self.background, *(s.colour for s in self.shapes))

    @classmethod
    def from_row(cls, row: dict) -> "Card":
        return cls(**{**row, "shapes": tuple(Shape(**s) for s in row["shapes"])})

    def to_row(self) -> dict:
        return asdict(self)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def held_out(key: str) -> bool:
    """A fifth of all keys are."""
    return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


def is_held_out_word(word: str) -> bool:
    return held_out(word)


def is_held_out_pair(background: str, colour: str) -> bool:
    return held_out(f"{background}/{colour}")


def sample_card(rng: random.Random, held_out: bool = False, any_pair: bool = False) -> Card:
    """Draw a training card, or one whose word and every colour pair are held out.

    Training cards carry 0, 1 or 2 shapes (10, 45, 45 %), held-out cards 1 or 2.
    `any_pair` mixes held-out pairs into training cards: use `training_caption`.
    """
    colours: list[str] = []
    while not colours:
        background = rng.choice(list(PALETTE))
        colours = [
            c
            for c in PALETTE
            if c != background and (any_pair or is_held_out_pair(background, c) == held_out)
        ]
    count = rng.choices((0, 1, 2), (0 if held_out else 10, 45, 45))[0]
    places = sorted(rng.sample(list(PLACES), count), key=PLACES.get)
    shapes = tuple(Shape(rng.choice(SHAPES), rng.choice(colours), p) for p in places)
    while True:
        word = "".join(rng.choices(ALPHABET, k=rng.choice(WORD_LENGTHS)))
        if is_held_out_word(word) == held_out:
            return Card(background, shapes, rng.choice(list(TEXT_COLOURS)), word)


def training_caption(card: Card, rng: random.Random, noise: float = 0.0) -> str:
    """A caption without held-out pairs, each colour word wrong with probability `noise`.

    One caption in ten, and each that would name a held-out pair, leaves either the
    background's or the shapes' colours unsaid.
    """
    background = rng.choice(list(PALETTE)) if rng.random() < noise else card.background
    shapes = tuple(
        replace(s, colour=rng.choice(list(PALETTE))) if rng.random() < noise else s
        for s in card.shapes
    )
    said = replace(card, background=background, shapes=shapes)
    if said.has_held_out_pair or rng.random() < 0.1:
        names_background = rng.random() < 0.5
        return said.caption(names_background, not names_background)
    return said.caption()


def draw(card: Card, scale: float = 1.0) -> Image.Image:
    """Render the card in RGB, `scale` times 64 x 96 pixels, anti-aliased."""
    canvas = Canvas(PALETTE[card.background], scale)
    for shape in card.shapes:
        canvas.shape(shape.kind, PLACES[shape.place], PALETTE[shape.colour])
    canvas.word(card.word, TEXT_COLOURS[card.text_colour])
    return canvas.picture()


def colour_obedience(image: Image.Image, card: Card) -> float:
    """The share of the card's colour words that the pixels obey, in [0, 1].

    The background is the median of the frame, a shape the median of the 8 x 8
    pixels at the centre of its block; each is named by the nearest palette colour.
    """
    pixels = np.asarray(image.convert("RGB").resize((WIDTH_PIXELS, HEIGHT_PIXELS)), dtype=float)
    frame = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    obeyed = [_nearest_colour(np.median(frame, axis=0)) == card.background]
    for shape in card.shapes:
        x, y = (PLACES[shape.place] * 2 + 1) * BLOCK_PIXELS // 2, BLOCK_PIXELS // 2
        patch = pixels[y - 4 : y + 4, x - 4 : x + 4].reshape(-1, 3)
        obeyed.append(_nearest_colour(np.median(patch, axis=0)) == shape.colour)
    return sum(obeyed) / len(obeyed)


def _nearest_colour(rgb: np.ndarray) -> str:
    return min(PALETTE, key=lambda name: float(np.square(rgb - PALETTE[name]).sum()))
