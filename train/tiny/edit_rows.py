"""Rows of edits, with their pictures: `edits_train.jsonl`, `edits_eval.jsonl` and, for training of
the decoder, `edits_words.jsonl`: every second one changes the word.

prompt, kind, text      the last: the word that the wanted result shows
sources, image          pictures; `image` is the wanted result
keep                    boxes in pixels in which the result is to equal the first source
style                   of `style`: another card in that style
subjects                of `subjects` and `identity`: a box a source, what is to be carried over
source_prompt, target_prompt   of `edit`: the captions of source and result
edit                    the wanted scene and the regions asked for, as `edit_measure` reads them
"""

import json
import random
from itertools import cycle
from pathlib import Path

from duet.train.tiny.drawing import BLOCK_PIXELS, HEIGHT_PIXELS, SLOT_PIXELS, WIDTH_PIXELS
from duet.train.tiny.edits import BACKGROUND, KINDS, WORD, Edit, change_style_to, sample_edit
from duet.train.tiny.scenes import Scene, box_in_block, draw_scene
from duet.train.tiny.world import PLACES, Card

# of each file how many rows, and their kinds in turn
_FILES = {
    "train": (160, list(KINDS)),
    "eval": (96, list(KINDS)),
    "words": (96, [each for kind in KINDS for each in (kind, WORD)]),
}
_EDGE = 3  # pixels into which resampling carries the ground
_CORE_PIXELS = 3, 5  # half the width and height that lie within every shape, also in outline


def write_edits(folder: Path, seed: int = 7) -> None:
    """All files; the rows of evaluation are held out."""
    for name, (count, kinds) in _FILES.items():
        rng, held_out = random.Random(f"{seed}/edits/{name}"), name == "eval"
        rows = []
        for place, kind in zip(range(count), cycle(kinds)):
            edit = _changed_word(rng) if kind == WORD else sample_edit(kind, rng, held_out)
            rows.append(_row(folder, f"edits_{name}/{place:03d}", edit, rng, held_out))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"edits_{name}.jsonl").write_text(lines)


def _changed_word(rng: random.Random) -> Edit:
    while (edit := sample_edit("edit", rng)).asked != (WORD,):
        pass
    return edit


def _row(folder: Path, stem: str, edit: Edit, rng: random.Random, held_out: bool) -> dict:
    kind = edit.kind
    row = {"prompt": edit.prompt, "kind": kind, "text": edit.wanted.card.word}
    row["sources"] = [
        _saved(scene, folder, f"{stem}-source{i}") for i, scene in enumerate(edit.sources)
    ]
    row["image"] = _saved(edit.wanted, folder, f"{stem}-wanted")
    if boxes := kept_boxes(edit):
        row["keep"] = boxes
    if kind == "style":
        other = change_style_to(edit.wanted.style, rng, held_out).wanted
        row["style"] = _saved(other, folder, f"{stem}-style")
    if kind == "edit":
        row["source_prompt"] = edit.sources[0].card.prompt
        row["target_prompt"] = edit.wanted.card.prompt
    if subjects := subject_boxes(edit):
        row["subjects"] = subjects
    return row | {"edit": {"wanted": edit.wanted.to_row(), "asked": list(edit.asked)}}


def _saved(scene: Scene, folder: Path, stem: str) -> str:
    path = f"{stem}.png"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    draw_scene(scene).save(folder / path, optimize=True)
    return path


def kept_boxes(edit: Edit) -> list[list[int]]:
    """Where the wanted result equals the first source, pixel by pixel; [left, top, right, bottom].

    On another ground that is within shapes alone; an emblem may have another place; of two sources
    the word of the second stays, and nothing of the first where it was.
    """
    if edit.kind == "subjects":
        return []
    if edit.kind == "identity":
        before, after = edit.sources[0].emblem, edit.wanted.emblem
        left, top, right, bottom = box_in_block(after.place)
        inside = [left + _EDGE, top + _EDGE, right - _EDGE, bottom - _EDGE]
        return [inside] if before == after else []
    if BACKGROUND in edit.asked:
        return [_core(shape.place) for shape in edit.sources[0].card.shapes]
    half = [0, BLOCK_PIXELS, WIDTH_PIXELS, HEIGHT_PIXELS]
    blocks = [_block(place) for place in PLACES if place not in edit.asked]
    return blocks if WORD in edit.asked else [*blocks, half]


def _block(place: str) -> list[int]:
    left = PLACES[place] * BLOCK_PIXELS
    return [left, 0, left + BLOCK_PIXELS, BLOCK_PIXELS]


def _core(place: str) -> list[int]:
    left, top, right, bottom = _block(place)
    x, y, (half_width, half_height) = (left + right) // 2, (top + bottom) // 2, _CORE_PIXELS
    return [x - half_width, y - half_height, x + half_width, y + half_height]


def subject_boxes(edit: Edit) -> list[list[int]]:
    """In each source what is carried over; none where the source itself is edited."""
    if edit.kind == "identity":
        return [box_in_block(edit.sources[0].emblem.place)]
    if edit.kind == "subjects":
        first, second = edit.sources
        return [box_in_block(first.card.shapes[0].place), _word_box(second.card)]
    return []


def _word_box(card: Card) -> list[int]:
    return [0, BLOCK_PIXELS, SLOT_PIXELS * len(card.word), HEIGHT_PIXELS]
