"""Datasets of prompts: a file, a folder or a hub id in, checked rows out."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from duet.configs.errors import UserError
from duet.configs.hub import is_hub_id
from duet.configs.row import Row, check_row, make_row
from duet.configs.row_datasets import read_dataset
from duet.configs.row_files import TEXT_FILES, Table, read_text_file
from duet.configs.schema import DataConfig, RunConfig

_FILES = (*TEXT_FILES, ".parquet")


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The rows of a table, each made when it is asked for."""

    table: Table
    columns: Mapping[str, str] = field(default_factory=dict)  # our key: the dataset's column

    def __len__(self) -> int:
        return len(self.table.records)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._made(index, self.table.records[index])

    def __iter__(self) -> Iterator[Row]:
        return (self._made(index, record) for index, record in enumerate(self.table.records))

    def _made(self, index: int, record: Mapping[str, Any]) -> Row:
        return make_row(record, self.table.where(index), self.table.folder, self.columns)


def load_rows(
    path: str | Path,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    columns: Mapping[str, str] | None = None,
    shape: tuple[int, int] | None = None,
    show: bool = False,
) -> Rows:
    """Rows of a dataset, all of them checked; relative picture paths are made absolute.

    `split`, `name`, `revision`: what `datasets.load_dataset` calls so.
    `shape`: width and height in proportion to which every picture must be.
    Raises UserError for what cannot be read or is empty, and for a bad row by its place.
    """
    path = os.path.expanduser(path)
    rows = Rows(_table(path, split, name, revision), columns or {})
    if not len(rows):
        raise UserError(f"prompt file {path!r} is empty: give at least one row with a prompt")
    found = set()
    # where the output is no terminal, `None` shows no bar
    with tqdm(rows, f"checking {path}", leave=False, disable=None if show else True) as bar:
        for row in bar:
            check_row(row, *(shape or ()))
            found |= row.keys()
    for key, column in rows.columns.items():
        if key not in found:
            raise UserError(
                f"data.columns: {key} = {column!r} is in no row of {path}: "
                f"there are {', '.join(sorted(found))}"
            )
    return rows


def rows_of(config: RunConfig, part: Literal["train", "eval"], show: bool = True) -> Rows:
    """The rows that a run trains on or is evaluated on."""
    data, sampling = config.data, config.sampling
    shape = (sampling.width, sampling.height) if data.fit == "refuse" else None
    return load_rows(getattr(data, part), *_named(data, part), data.columns, shape, show)


def stored_rows(config: RunConfig, part: Literal["train", "eval"]) -> Rows | None:
    """The same without a check, which would decode all pictures; None where they are not on this
    disk.
    """
    data = config.data
    path = os.path.expanduser(getattr(data, part))
    return Rows(_table(path, *_named(data, part)), data.columns) if os.path.exists(path) else None


def _named(data: DataConfig, part: Literal["train", "eval"]) -> tuple[str | None, ...]:
    """Split, configuration and revision."""
    return {
        "train": (data.train_split, data.train_name, data.train_revision),
        "eval": (data.eval_split, data.eval_name, data.eval_revision),
    }[part]


def _table(path: str, split: str | None, name: str | None, revision: str | None) -> Table:
    file = Path(path)
    suffix = file.suffix
    if suffix in TEXT_FILES and not file.is_dir():
        if split or name or revision:
            told = f"split {split!r}, configuration {name!r} or revision {revision!r}"
            raise UserError(f"{path} is one file: it has no {told}")
        return read_text_file(file)
    if file.is_file() and suffix not in _FILES:
        raise UserError(f"prompt file {path!r}: allowed are {', '.join(_FILES)}")
    if not file.exists() and (suffix in _FILES or not is_hub_id(path)):
        raise UserError(
            f"prompt file {path!r} cannot be read: no such file or folder, and no hub id"
        )
    if file.exists() and revision:
        raise UserError(f"{path} is no dataset of the hub: it has no revision {revision!r}")
    return read_dataset(path, split, name, revision)
