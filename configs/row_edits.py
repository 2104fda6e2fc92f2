"""What a row says of an edit: its sources, and what rewards read beside them.

    sources          pictures in order; `source` stands for a list of one
    keep             what must stay of the first source: a mask picture of its size (white: stays),
                     or a list of boxes [left, top, right, bottom] in its pixels
    style            the picture whose style is wanted, or the place of one among the sources,
                     counted from 0
    subjects         a box in each source's pixels, null for a source of which nothing is carried
                     over; without the column every source is one whole, save that of the style
    source_prompt, target_prompt
                     what the first source shows, and what the picture is to show

All functions take a row's columns, and take them for checked.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from PIL import Image

from duet.configs.errors import UserError
from duet.configs.pictures import Stored, is_see_through, read_picture, shown_size
from duet.configs.regions import WHITE, Box, black_and_white, mask_of_boxes, read_box
from duet.configs.setting import shown

SOURCE, SOURCES, KEEP, STYLE, SUBJECTS = "source", "sources", "keep", "style", "subjects"
PROMPTS = ("source_prompt", "target_prompt")
_Columns = Mapping[str, Any]
_Size = tuple[int, int]  # width and height in pixels


def is_stored(value: Any) -> TypeGuard[Stored]:
    """Whether a cell holds a picture, or its path, and not boxes or a number."""
    return isinstance(value, str | bytes | Image.Image)


def sources_of(row: _Columns) -> tuple[Stored, ...]:
    """What an edit starts from, in order, as it is stored; none: a prompt of text."""
    if row.get(SOURCES) is not None:
        return tuple(row[SOURCES])
    return () if row.get(SOURCE) is None else (row[SOURCE],)


def picture_of(row: _Columns, key: str) -> Image.Image | None:
    """As a viewer shows it; `source` is the first of the sources, `keep` a mask of its size in mode
    L, white what must stay of it. None where the row has none.
    """
    value = row.get(key)
    if key == SOURCE and value is None:
        value = next(iter(sources_of(row)), None)
    elif key == STYLE and _is_place(value):
        value = sources_of(row)[value]
    if value is None:
        return None
    if key != KEEP:
        return read_picture(value)
    if is_stored(value):
        return black_and_white(read_picture(value))
    return mask_of_boxes([Box(*box) for box in value], shown_size(sources_of(row)[0]))


def subjects_of(row: _Columns, sizes: Sequence[_Size]) -> list[Box | None]:
    """One a source of those sizes, in its pixels; None: nothing of that source is carried over."""
    given = row.get(SUBJECTS)
    if given is not None:
        return [box and Box(*box) for box in given]
    style = row.get(STYLE)
    place = style if _is_place(style) else None
    return [None if i == place else Box(0, 0, *size) for i, size in enumerate(sizes)]


def check_edit(row: _Columns, sizes: Sequence[_Size]) -> None:
    """`sizes`: of the sources, as a viewer shows them.

    Raises UserError for a column that does not fit them. That `keep` and `style` hold pictures
    that can be read has been checked.
    """
    if KEEP in row:
        _require_sources(KEEP, sizes)
        _check_keep(row[KEEP], sizes[0])
    if STYLE in row and not is_stored(row[STYLE]):
        _check_place(row[STYLE], len(sizes))
    if SUBJECTS in row:
        _require_sources(SUBJECTS, sizes)
        _check_subjects(row[SUBJECTS], sizes)
    prompts = [row[key] for key in PROMPTS if key in row]
    for key, prompt in zip([key for key in PROMPTS if key in row], prompts, strict=True):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{key} = {shown(prompt)} must be a non-empty string")
    if len(prompts) == 2 and prompts[0] == prompts[1]:
        raise UserError(
            f"source_prompt and target_prompt are both {shown(prompts[0])}: say what is to change"
        )


def _is_place(value: Any) -> bool:
    return type(value) is int


def _require_sources(key: str, sizes: Sequence[_Size]) -> None:
    if not sizes:
        raise UserError(f"{key} speaks of sources and the row has none: give them, or leave it out")


def _check_keep(keep: Any, size: _Size) -> None:
    if is_stored(keep):
        mask = black_and_white(read_picture(keep))
        if mask.size != size:
            raise UserError(
                f"{KEEP} has {mask.width} x {mask.height} pixels and the first source {size[0]} x "
                f"{size[1]}: a mask has the first source's size"
            )
        if is_see_through(keep):
            raise UserError(
                f"{KEEP} is a mask with transparent pixels, of which nobody knows whether they "
                "must stay: save it in black and white, white what must stay"
            )
        if mask.getextrema()[1] < WHITE:
            raise UserError(f"{KEEP} is a mask without white, which is what must stay")
        return
    if not isinstance(keep, list) or not keep:
        raise UserError(
            f"{KEEP} = {shown(keep)} must be a mask picture or its path, or a list of boxes "
            "[left, top, right, bottom], with one at least"
        )
    for i, box in enumerate(keep):
        read_box(f"{KEEP}[{i}]", box, size)


def _check_place(style: Any, count: int) -> None:
    if not _is_place(style) or not 0 <= style < count:
        counted = f", or 0 to {count - 1} for the place of a source" if count else ""
        raise UserError(f"{STYLE} = {shown(style)} must be a picture or its path{counted}")


def _check_subjects(subjects: Any, sizes: Sequence[_Size]) -> None:
    if not isinstance(subjects, list) or len(subjects) != len(sizes):
        raise UserError(
            f"{SUBJECTS} = {shown(subjects)} must be a list of a box [left, top, right, bottom] a "
            f"source, null for one without a subject: there are {len(sizes)} sources"
        )
    for i, (box, size) in enumerate(zip(subjects, sizes, strict=True)):
        if box is not None:
            read_box(f"{SUBJECTS}[{i}]", box, size)
    if not any(subjects):
        raise UserError(f"{SUBJECTS} = {shown(subjects)} names none: give a box, or leave it out")
