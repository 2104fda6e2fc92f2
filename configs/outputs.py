"""Files that a command makes: in a folder that can be written, never in another's place."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from duet.configs.errors import UserError, require_folder, tell

_UNFINISHED = ".duet_unfinished"


def make_folder(name: str, folder: Path) -> None:
    """Make the folder that `name` was set to. Raises UserError where it cannot be written."""
    try:
        require_folder(name, folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{name} = {str(folder)!r} cannot be written ({error.strerror}): name another folder"
        ) from error


def require_free(name: str, folder: Path, entries: Iterable[str]) -> None:
    """Raises UserError where the folder holds one of the entries that are to be made there."""
    taken = [entry for entry in entries if os.path.lexists(folder / entry)]
    if taken:
        raise UserError(
            f"{name} = {str(folder)!r} holds {', '.join(taken)} already, and nothing is "
            "overwritten: name another folder"
        )


@contextmanager
def staged(name: str, folder: Path, entries: Sequence[str]) -> Iterator[Path]:
    """Yields a folder to make the entries in; they move to `folder` when all is done.

    What fails or is killed leaves what it made there, until the next try makes it anew.
    Raises UserError where `folder` holds one of the entries.
    """
    require_free(name, folder, entries)
    unfinished = folder / _UNFINISHED
    with _writing(unfinished):
        if os.path.lexists(unfinished):
            shutil.rmtree(unfinished)
        unfinished.mkdir()
    try:
        yield unfinished
    except BaseException:
        tell(f"unfinished: what was made lies in {str(unfinished)!r} until the next try")
        raise
    require_free(name, folder, entries)
    with _writing(folder):
        for entry in entries:
            (unfinished / entry).rename(folder / entry)
        unfinished.rmdir()


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet; what cannot be written whole is not left.

    Raises FileExistsError where it is there, UserError where it cannot be written.
    """
    with _writing(path), path.open("xb") as file:
        try:
            file.write(content)
            file.flush()
        except OSError:  # a full disk
            path.unlink()
            raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
