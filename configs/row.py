"""One row of a dataset, and what it must be before a run begins."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from duet.configs.errors import UserError
from duet.configs.pictures import Stored, is_cropped, read_picture
from duet.configs.setting import shown

PICTURES = ("image", "source")  # the wanted picture; what an edit starts from
SOURCES = "sources"  # several of the latter, in order


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
        if SOURCES in self.columns:
            return tuple(self.columns[SOURCES])
        return (self.columns["source"],) if "source" in self.columns else ()

    def picture(self, key: str) -> Image.Image | None:
        """As a viewer shows it; None where the row has none."""
        return read_picture(self.columns[key]) if key in self.columns else None


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
    """A path made absolute; `datasets` keeps a picture as its bytes, or as a path without them."""
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, str) and value:
        return str(folder / os.path.expanduser(value))
    return value


def check_row(row: Row, width: int | None = None, height: int | None = None) -> None:
    """Raises UserError with the row's place for a column that no run can use.

    Its pictures are decoded; with width and height they must have that shape.
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
    for key in PICTURES:
        if key in row:
            _check_picture(row, key, row[key], width, height)
    if SOURCES in row:
        _check_sources(row)
        for i, stored in enumerate(row[SOURCES]):
            _check_picture(row, f"{SOURCES}[{i}]", stored, width, height)


def _check_sources(row: Row) -> None:
    value = row[SOURCES]
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{row.where}: {SOURCES} = {shown(value)} must be a list of pictures or their paths, "
            "with one at least (a single one may stand as `source`)"
        )
    if "source" in row:
        raise UserError(f"{row.where} has both source and {SOURCES}: put all into {SOURCES}")


def _check_picture(row: Row, key: str, stored: Any, width: int | None, height: int | None) -> None:
    if not isinstance(stored, str | bytes | Image.Image) or stored == "":
        raise UserError(f"{row.where}: {key} = {shown(stored)} must be a picture or its path")
    if isinstance(stored, str) and ("\0" in stored or not os.path.isfile(stored)):
        raise UserError(f"{row.where}: {key} {stored!r} does not exist, or is no file")
    try:
        picture = read_picture(stored)
    except UserError as error:
        raise UserError(f"{row.where}: {key}: {error}") from error
    if width and height and is_cropped(picture, width, height):
        raise UserError(
            f"{row.where}: {key} has {picture.width} x {picture.height} pixels, another shape "
            f"than the run's {width} x {height}: data.fit = 'crop' takes its centre"
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _check_characters(row: Row, key: str, text: str) -> None:
    for character in text:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            kind = "NUL" if character == "\0" else "half of a surrogate pair"
            raise UserError(f"{row.where}: {key} = {shown(text)} holds {character!r}, {kind}")
