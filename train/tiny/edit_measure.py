"""Whether an edit is done, worked out from pixels: what was asked is there, the rest has stayed.

A picture is read region by region: the ground (the rows above and below shapes and word), the
three blocks, the five letter slots. Each is compared with drawings of all that could stand there;
it is right if the wanted drawing is the nearest, and near enough. So a letter is the nearest drawn
letter of its slot, not what OCR makes of it. Blocks and slots are drawn on the ground that was
found: on a wrong one they may be right.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from duet.train.tiny.drawing import BLOCK_PIXELS, HEIGHT_PIXELS, SLOT_PIXELS, WIDTH_PIXELS
from duet.train.tiny.edits import BACKGROUND, WORD
from duet.train.tiny.scenes import PLAIN, Emblem, Scene, draw_scene
from duet.train.tiny.world import ALPHABET, PALETTE, PLACES, SHAPES, TEXT_COLOURS, Card, Shape

_LETTERS = 5  # slots that a word may fill
_TOLERANCE = 64.0  # root of the mean squared difference to the wanted region, in grey levels
_GROUND_STYLES = PLAIN, "striped", "night"
_GROUND_ROWS = np.r_[0:4, 29:36, 60:64]  # stripes are four rows high

_COLUMNS = [slice(c * BLOCK_PIXELS, (c + 1) * BLOCK_PIXELS) for c in PLACES.values()]

Box = tuple[slice, slice]


@dataclass(frozen=True)
class EditScore:
    regions: Mapping[str, float]  # by name: the share of it that is as wanted, in [0, 1]
    asked: tuple[str, ...]

    @property
    def success(self) -> float:
        """1 if every region is as wanted, else 0."""
        return float(all(share == 1 for share in self.regions.values()))

    @property
    def kept(self) -> float:
        """The mean over the regions of which the prompt says nothing."""
        stays = [share for name, share in self.regions.items() if name not in self.asked]
        return sum(stays) / len(stays)


def measure_edit(image: Image.Image, wanted: Scene, asked: tuple[str, ...]) -> EditScore:
    """Of a picture of any size; `asked`: the regions that the prompt speaks of."""
    picture = np.asarray(image.convert("RGB").resize((WIDTH_PIXELS, HEIGHT_PIXELS)), dtype=float)
    grounds = _grounds(wanted)
    distance = _distances(picture[_GROUND_ROWS], np.stack([ground.rows for ground in grounds]))
    found = int(distance.argmin())
    right = {BACKGROUND: [found == 0 and bool(distance[0] < _TOLERANCE)]}
    for name, box, drawings in _regions(grounds[found].scene):
        distance = _distances(picture[box], drawings)
        near = distance.argmin() == 0 and distance[0] < _TOLERANCE
        right.setdefault(name, []).append(bool(near))
    return EditScore({name: sum(parts) / len(parts) for name, parts in right.items()}, asked)


def _distances(seen: np.ndarray, drawings: np.ndarray) -> np.ndarray:
    """Root of the mean squared difference to each of `drawings` [K, ...]: [K]."""
    return np.sqrt(np.square(drawings - seen).reshape(len(drawings), -1).mean(-1))


@dataclass(frozen=True)
class _Ground:
    scene: Scene  # the wanted one, on this ground
    rows: np.ndarray  # uint8


@lru_cache(maxsize=64)
def _grounds(wanted: Scene) -> list[_Ground]:
    """The wanted one first, then those of every other colour and style."""
    own = PLAIN if wanted.style == "outline" else wanted.style  # outlines are seen in the blocks
    kinds = [(own, wanted.card.background)]
    kinds += [(s, c) for s in _GROUND_STYLES for c in PALETTE if (s, c) != kinds[0]]
    grounds = []
    for style, colour in kinds:
        kept = wanted.style if style == own else style
        scene = replace(wanted, style=kept, card=replace(wanted.card, background=colour))
        bare = Scene(replace(scene.card, shapes=(), word=""), style)
        grounds.append(_Ground(scene, _drawn(bare)[_GROUND_ROWS]))
    return grounds


@lru_cache(maxsize=64)
def _regions(wanted: Scene) -> list[tuple[str, Box, np.ndarray]]:
    """Name, place and drawings [K, h, w, 3], the wanted one first, of blocks and slots; a block
    with an emblem is four, a cell each, the word one a slot.
    """
    first, regions = _drawn(wanted), []
    ground = wanted.card.background, wanted.style
    for name, column in PLACES.items():
        box = _box(0, column * BLOCK_PIXELS, BLOCK_PIXELS, BLOCK_PIXELS)
        if wanted.emblem and wanted.emblem.place == name:
            half = BLOCK_PIXELS // 2
            quarters = [_box(y, box[1].start + x, half, half) for y in (0, half) for x in (0, half)]
            regions += [
                (name, quarter, _differing(first, _cells(*ground), quarter)) for quarter in quarters
            ]
        else:
            regions.append((name, box, _differing(first, _blocks(*ground), box)))
    for slot in range(_LETTERS):
        box = _box(BLOCK_PIXELS, slot * SLOT_PIXELS, HEIGHT_PIXELS - BLOCK_PIXELS, SLOT_PIXELS)
        regions.append((WORD, box, _differing(first, _words(*ground), box)))
    return regions


def _box(top: int, left: int, height: int, width: int) -> Box:
    return slice(top, top + height), slice(left, left + width)


def _differing(first: np.ndarray, others: list[np.ndarray], box: Box) -> np.ndarray:
    """The wanted region and those of the others that show something else there."""
    wanted = first[box]
    differ = (o[box] for o in others if np.abs(o[box].astype(float) - wanted).mean() > 1)
    return np.stack([wanted, *differ])


def _drawn(scene: Scene) -> np.ndarray:
    return np.asarray(draw_scene(scene))


@cache
def _blocks(background: str, style: str) -> list[np.ndarray]:
    """All three blocks empty, or with a shape of every kind and colour, filled or in outline."""
    styles = (PLAIN, "outline") if style in (PLAIN, "outline") else (style,)
    shapes = [
        tuple(Shape(kind, colour, place) for place in PLACES)
        for kind in SHAPES
        for colour in PALETTE
        if colour != background
    ]
    drawn = [_drawn(Scene(Card(background, own, "white", ""), s)) for own in shapes for s in styles]
    return [_drawn(Scene(Card(background, (), "white", ""), style)), *drawn]


@cache
def _cells(background: str, style: str) -> list[np.ndarray]:
    """All three blocks empty, or with emblems of one colour."""
    bare = Card(background, (), "white", "")
    drawn = [_drawn(Scene(bare, style))]
    for colour in PALETTE:
        if colour != background:
            three = [_drawn(Scene(bare, style, Emblem((colour,) * 4, place))) for place in PLACES]
            drawn.append(np.concatenate([p[:, b] for p, b in zip(three, _COLUMNS, strict=True)], 1))
    return drawn


@cache
def _words(background: str, style: str) -> list[np.ndarray]:
    """Every letter in every slot, in either colour, and none."""
    words = ["", *(letter * _LETTERS for letter in ALPHABET)]
    return [
        _drawn(Scene(Card(background, (), colour, word), style))
        for word in words
        for colour in TEXT_COLOURS
    ]
