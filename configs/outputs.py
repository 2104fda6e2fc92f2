"""Files that a command makes: in a folder that can be written, never in another's place."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from duet.configs.errors import UserError, require_folder


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


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet; what cannot be written whole is not left.

    Raises FileExistsError where it is there, UserError where it cannot be written.
    """
    try:
        with path.open("xb") as file:
            try:
                file.write(content)
                file.flush()
            except OSError:
                path.unlink()  # a full disk
                raise
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}") from error
