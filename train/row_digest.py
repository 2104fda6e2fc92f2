"""A dataset's rows by their content."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duet.configs.row import PICTURES, Row
from duet.configs.row_edits import SOURCES, is_stored


def row_digest(rows: Sequence[Row]) -> str:
    """A picture counts by its name: a dataset may be moved."""
    digest = hashlib.sha256()
    for row in rows:
        named = {k: _name(v) if k in PICTURES and is_stored(v) else v for k, v in row.items()}
        if SOURCES in row:
            named[SOURCES] = list(map(_name, row[SOURCES]))
        digest.update(json.dumps(named, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _name(picture: Any) -> str:
    return Path(picture).name if isinstance(picture, str) else "the dataset's own"
