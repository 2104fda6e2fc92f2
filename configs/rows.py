"""Prompt datasets: JSONL, one object with a `prompt` a line."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from duet.configs.errors import UserError

PICTURES = ("image", "source")  # keys of a row that name picture files


def load_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; `prompt` is required, a relative picture path is made absolute.

    Pictures: `image`, the reference of the fidelity reward, and `source`, what an edit starts from.

    Raises UserError for a missing or empty file, and for a bad line by its number.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {str(path)!r} cannot be read: {error}") from error
    rows = [_row(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"prompt file {str(path)!r} is empty: give one JSON object a line")
    return rows


def read_picture(path: str) -> Image.Image:
    """A row's picture in RGB. Raises UserError for one that cannot be read."""
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise UserError(f"picture {path!r} of a row cannot be read: {error}") from error


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{where} needs a non-empty "prompt": {line.strip()[:80]}')
    for key in PICTURES:
        if row.get(key):
            if not isinstance(row[key], str):
                raise UserError(f"{where}: {key} = {row[key]!r} must be the path of a picture")
            picture = path.parent / row[key]
            if not picture.is_file():
                raise UserError(f"{where}: {key} {str(picture)!r} does not exist")
            row[key] = str(picture)
    return row
