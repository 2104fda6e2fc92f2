"""What a user did wrong: one clear line and exit status 2."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """A mistake outside the code: name, value, what is allowed, what to do."""

    def __init__(self, text: str, status: int = 2) -> None:
        """`status`: what the command exits with."""
        super().__init__(text)
        self.status = status


def require_folder(name: str, path: Path) -> None:
    """Raises UserError where a folder is to be written and a file stands."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{name} = {str(path)!r} is a file: name a folder")


def require_writable(name: str, path: Path) -> None:
    """Make the folder. Raises UserError where it cannot be made or written."""
    require_folder(name, path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(
            f"{name} = {str(path)!r} cannot be written ({error.strerror}): name another folder"
        ) from error


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a command; a UserError becomes one line on stderr and its exit status.

    Ctrl-C ends with 130, as shells expect (128 + the signal's number).
    """
    try:
        main()
    except UserError as error:
        print(f"duet: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("duet: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
