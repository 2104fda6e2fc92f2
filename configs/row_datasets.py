"""Datasets in the forms of `datasets`: parquet, imagefolder, saved, or on the hub."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duet.configs.errors import UserError
from duet.configs.row_files import Table

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def read_dataset(path: str, split: str | None, name: str | None, revision: str | None) -> Table:
    """A parquet file, a folder, or a hub id; `name` is a configuration of it.

    Raises UserError for what `datasets` cannot read, and for a split that must be named.
    """
    import datasets  # seconds: only for those who use it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is told below
    local = Path(path)
    try:
        records = (
            _local(local, split, name) if local.exists() else _hub(path, split, name, revision)
        )
    except UserError:
        raise
    except Exception as error:  # the readers of many formats raise anything
        reason = str(error) or type(error).__name__
        asked = "" if local.is_file() else f" (data.train_name or data.eval_name: {name!r})"
        raise UserError(f"dataset {path!r} cannot be read: {reason}{asked}") from error
    told = ", ".join(part for part in (name, split) if part)
    place = f"{path} ({told})" if told else path
    folder = local if local.is_dir() else local.parent
    return Table(records, lambda index: f"{place}: row {index + 1}", folder.absolute())


def _hub(path: str, split: str | None, name: str | None, revision: str | None) -> "Dataset":
    """From the hub's cache, which `HF_HOME` places; mapped, not held in memory."""
    import datasets

    loaded = datasets.load_dataset(path, name, revision=revision)
    return _undecoded(_one_split(loaded, path, split))


def _local(path: Path, split: str | None, name: str | None) -> Any:
    import datasets

    saved = any((path / file).exists() for file in ("state.json", "dataset_dict.json"))
    if name and (saved or path.is_file()):
        raise UserError(f"dataset {str(path)!r} has no configurations: leave out {name!r}")
    if saved:
        return _undecoded(_one_split(datasets.load_from_disk(path), str(path), split))
    # as a stream nothing is cached: a file that was edited is read anew, and home stays clean
    with tempfile.TemporaryDirectory(prefix="duet-") as cache:
        if path.is_file():
            kind, files = "parquet", {"data_files": str(path)}
        else:
            kind, files = str(path), {}
            builder = datasets.load_dataset_builder(kind, name, cache_dir=cache)
            module = type(builder).__module__.rpartition(".")[2]
            if module in ("csv", "json", "text"):
                raise UserError(
                    f"dataset {str(path)!r} is a folder of {module} files: name the file itself"
                )
        loaded = datasets.load_dataset(kind, name, streaming=True, cache_dir=cache, **files)
        return list(_one_split(loaded, str(path), split).decode(False))


def _one_split(loaded: "Dataset | DatasetDict", path: str, split: str | None) -> Any:
    if not isinstance(loaded, dict):
        if split:
            raise UserError(f"dataset {path!r} has no splits: leave out split {split!r}")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        told = "leave out its split" if len(loaded) == 1 else "name one"
        raise UserError(
            f"dataset {path!r} has the splits {', '.join(loaded)}, not {split!r}: {told} with "
            "data.train_split or data.eval_split"
        )
    return loaded[split]


def _undecoded(dataset: "Dataset") -> "Dataset":
    """Pictures stay as they are stored until they are needed."""
    import datasets

    as_stored = datasets.Image(decode=False)
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, as_stored)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, datasets.List(as_stored))
    return dataset
