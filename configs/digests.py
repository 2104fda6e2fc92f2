"""SHA256SUMS: the digests of a folder's files, written last, as `sha256sum -c` reads them."""

import hashlib
from pathlib import Path
from typing import Any

from duet.configs.errors import UserError

SUMS = "SHA256SUMS"


class Damaged(UserError):
    """What was written is not what stands there; the message names the file."""


def write_digests(folder: Path) -> None:
    """Of every file in the folder, in subfolders too."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    lines = [f"{_digest(folder / name)}  {name}\n" for name in names if name != SUMS]
    # the count tells a list that lost its last lines; sha256sum passes over a comment
    (folder / SUMS).write_text("".join([f"# {len(lines)} files\n", *lines]))


def check_digests(folder: Path) -> None:
    """Every file that was written stands there as it was; what was put beside them is not read.

    Raises Damaged.
    """
    for name, digest in _read(folder).items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        try:
            found = _digest(path)
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from error
        if found != digest:
            raise Damaged(f"{name} is not what was written: its digest differs")


def refuse_older(
    checkpoint: str | Path, folder: Path, told: Any, known: str, since: str, lacks: str
) -> None:
    """What an older Duet wrote is not damaged: its description `told` has the key `known` but not
    yet `since`, and no digests stand in the `folder`.

    `lacks`: what it was written without, and what to do. Raises UserError for it.
    """
    older = isinstance(told, dict) and known in told and since not in told
    if older and not (folder / SUMS).exists():
        raise UserError(
            f"checkpoint {str(checkpoint)!r} was written by an older Duet, without {lacks}"
        )


def _read(folder: Path) -> dict[str, str]:
    """{name: digest}"""
    try:
        head, *lines = (folder / SUMS).read_text().splitlines()
        digests = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise Damaged(f"{SUMS} cannot be read: {error}") from error
    if head != f"# {len(digests)} files" or any(".." in Path(name).parts for name in digests):
        raise Damaged(f"{SUMS} is not what was written")
    return digests


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
