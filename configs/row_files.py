"""Datasets as text, a record a line: JSONL, JSON, CSV, TSV, or one prompt a line.

Not read by `datasets`: its readers tell no line, and guess types. In CSV "007" becomes 7.0 and
the word "NA" null, a surplus cell moves a row by a column; in JSON "2024-01-05" becomes a date.
"""

import codecs
import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet.configs.errors import UserError


@dataclass(frozen=True)
class Table:
    """Records as a dataset has them."""

    records: Sequence[Mapping[str, Any]]
    where: Callable[[int], str]  # the place of a record, for messages
    folder: Path  # where relative paths begin


def read_text_file(path: Path) -> Table:
    """Raises UserError with the line of what cannot be read."""
    text = _text(path)
    read = {".csv": _csv, ".tsv": _csv, ".txt": _prompts, ".json": _json}.get(path.suffix, _jsonl)
    lines = read(text, path)
    records, numbers = [record for _, record in lines], [number for number, _ in lines]
    return Table(records, lambda index: f"{path}:{numbers[index]}", path.parent)


TEXT_FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
_Lines = list[tuple[int, Mapping[str, Any]]]  # numbers from 1


def _text(path: Path) -> str:
    data = b""
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line} is not UTF-8: {error.reason}") from error
    except OSError as error:
        raise UserError(f"prompt file {str(path)!r} cannot be read: {error.strerror}") from error


def _numbered(text: str) -> list[tuple[int, str]]:
    """Lines that are not blank; CRLF and CR end one, too."""
    lines = enumerate(io.StringIO(text, newline=None), 1)
    return [(number, line.rstrip("\n")) for number, line in lines if line.strip()]


def _prompts(text: str, path: Path) -> _Lines:
    return [(number, {"prompt": line}) for number, line in _numbered(text)]


def _jsonl(text: str, path: Path) -> _Lines:
    return [(number, parse_object(line, f"{path}:{number}")) for number, line in _numbered(text)]


def _json(text: str, path: Path) -> _Lines:
    tree = parse_json(text, str(path))
    if not isinstance(tree, list):
        raise UserError(f"{path}:1 holds no list of objects: one object a line is a .jsonl file")
    lines = []
    for number, record in enumerate(tree, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}: item {number} = {record!r:.80} must be an object")
        lines.append((number, record))
    return lines


def _csv(text: str, path: Path) -> _Lines:
    """All cells are strings; an empty one is as if it were not there."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    names, lines, number = None, [], 1
    try:
        for cells in reader:
            if names is None:
                names = [cell.strip() for cell in cells]
                twice = {name for name in names if names.count(name) > 1}
                if twice:
                    raise UserError(f"{path}:{number} has the column {twice.pop()!r} twice")
            elif cells:
                if len(cells) != len(names):
                    told = f"{len(cells)} cells under {len(names)} columns"
                    raise UserError(f"{path}:{number} has {told}: quote a cell that holds commas")
                row = zip(names, cells, strict=True)
                lines.append((number, {name: cell for name, cell in row if cell}))
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{number} is not CSV: {error}") from error
    return lines


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Raises UserError for anything but one JSON object."""
    record = parse_json(text, where)
    if not isinstance(record, dict):
        raise UserError(f'{where} must be an object like {{"prompt": "a card"}}: {text[:80]}')
    return record


def parse_json(text: str, where: str) -> Any:
    """Strict JSON: every key once, numbers finite. Raises UserError."""
    try:
        return json.loads(
            text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return dict(pairs)


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"{literal} is no finite number")
    return number
