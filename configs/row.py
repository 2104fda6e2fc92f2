"""One row of a dataset, and what it must be before a run begins."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from duet.configs.errors import UserError
from duet.configs.pictures import Stored, is_cropped, read_picture
from duet.configs.row_edits import (
    KEEP,
    SOURCE,
    SOURCES,
    STYLE,
    check_edit,
    is_stored,
    picture_of,
    sources_of,
)
from duet.configs.setting import shown

# columns of one picture; a `style` may be a number and `keep` boxes instead
PICTURES = ("image", SOURCE, STYLE, KEEP)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
_LONGEST_PATH = 4096  # characters; what is longer is a picture in base64


@dataclass(frozen=True, eq=False)  # equal as mappings are
class Row(Mapping[str, Any]):
    """A prompt, and as a mapping all columns of its row by the names that `data.columns` gives.

    A null is as if it were not there. Pictures are stored as absolute paths, bytes, or PIL's.
    """

    columns: Mapping[str, Any]
    where: str = "row"  # file and line

    def __getitem__(self, key: str) -> Any:
        return self.columns[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def prompt(self) -> str:
        return self.columns["prompt"]

    @property
    def sources(self) -> tuple[Stored, ...]:
        """What an edit starts from, in order, as it is stored; none: a prompt of text."""
        return sources_of(self.columns)

    def picture(self, key: str) -> Image.Image | None:
        """As a viewer shows it, of `keep` the mask in black and white; None where there is none."""
        return picture_of(self.columns, key)


def make_row(record: Mapping[str, Any], where: str, folder: Path, renamed: Mapping) -> Row:
    """`renamed`: our key to the dataset's column; relative picture paths begin at `folder`."""
    ours = {key: record.get(column) for key, column in renamed.items()}
    theirs = {k: v for k, v in record.items() if k not in renamed.values()}
    columns = {k: v for k, v in (theirs | ours).items() if v is not None}
    for key in PICTURES:
        if key in columns:
            columns[key] = _stored(columns[key], folder)
    if isinstance(columns.get(SOURCES), list):
        columns[SOURCES] = [_stored(value, folder) for value in columns[SOURCES]]
    return Row(columns, where)


def _stored(value: Any, folder: Path) -> Any:
    """A path made absolute; `datasets` keeps a picture as its bytes, or as a path without them.

    What is no path is left as it is, to be told as it was written.
    """
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, str) and value and not _URL.match(value):
        return str(folder / os.path.expanduser(value))
    return value


def check_row(row: Row, width: int | None = None, height: int | None = None) -> None:
    """Raises UserError with the row's place for a column that no run can use.

    Its pictures are decoded. With width and height, those of which a reward takes the centre must
    have that shape: all but the further sources, which are always whole.
    """
    prompt = row.get("prompt")
    if not _is_text(prompt):
        columns = ", ".join(map(repr, row)) or "none"
        raise UserError(
            f'{row.where} needs a non-empty "prompt", not {shown(prompt)}: its columns are '
            f"{columns} (another's name goes to data.columns: {{prompt: NAME}})"
        )
    _check_characters(row, "prompt", prompt)
    if "text" in row:
        text = row["text"]
        texts = text if isinstance(text, list) else [text]
        if not texts or not all(map(_is_text, texts)):
            raise UserError(
                f"{row.where}: text = {shown(text)} must be a non-empty string, or a list of them"
            )
        for each in texts:
            _check_characters(row, "text", each)
    _check_pictures(row, (width, height) if width and height else None)


def _check_pictures(row: Row, shape: tuple[int, int] | None) -> None:
    """And what speaks of parts of them."""
    if SOURCES in row:
        _check_sources(row)
    sizes = []
    for i, stored in enumerate(row.sources):
        compared = i == 0 or row.get(STYLE) == i
        key = f"{SOURCES}[{i}]" if SOURCES in row else SOURCE
        sizes.append(_check_picture(row, key, stored, shape if compared else None))
    if "image" in row:
        _check_picture(row, "image", row["image"], shape)
    for key in (STYLE, KEEP):
        if key in row and is_stored(row[key]):  # no number, no boxes
            _check_picture(row, key, row[key], shape)
    try:
        check_edit(row, sizes)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error


def _check_sources(row: Row) -> None:
    value = row[SOURCES]
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{row.where}: {SOURCES} = {shown(value)} must be a list of pictures or their paths, "
            "with one at least (a single one may stand as `source`)"
        )
    if "source" in row:
        raise UserError(f"{row.where} has both source and {SOURCES}: put all into {SOURCES}")


def _check_picture(
    row: Row, key: str, stored: Any, shape: tuple[int, int] | None
) -> tuple[int, int]:
    """Its width and height as a viewer shows it."""
    if not is_stored(stored) or stored == "":
        raise UserError(f"{row.where}: {key} = {shown(stored)} must be a picture or its path")
    if isinstance(stored, str) and _URL.match(stored):
        raise UserError(
            f"{row.where}: {key} = {shown(stored)} is a URL: download it, and give the file's path"
        )
    if isinstance(stored, str) and ("\0" in stored or not os.path.isfile(stored)):
        name = repr(stored) if len(stored) < _LONGEST_PATH else shown(stored)
        raise UserError(f"{row.where}: {key} {name} does not exist, or is no file")
    try:
        picture = read_picture(stored)
    except UserError as error:
        raise UserError(f"{row.where}: {key}: {error}") from error
    if shape and is_cropped(picture, *shape):
        raise UserError(
            f"{row.where}: {key} has {picture.width} x {picture.height} pixels, another shape "
            f"than the run's {shape[0]} x {shape[1]}: data.fit = 'crop' takes its centre"
        )
    return picture.size


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _check_characters(row: Row, key: str, text: str) -> None:
    for character in text:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            kind = "NUL" if character == "\0" else "half of a surrogate pair"
            raise UserError(f"{row.where}: {key} = {shown(text)} holds {character!r}, {kind}")
