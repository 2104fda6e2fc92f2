"""What a user did wrong: one clear line and exit status 2."""

import sys
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """A mistake outside the code: name, value, what is allowed, what to do."""


def require_folder(name: str, path: Path) -> None:
    """Raises UserError where a folder is to be written and a file stands."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{name} = {str(path)!r} is a file: name a folder")


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a command; a UserError becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"duet: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
