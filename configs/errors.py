"""What a user did wrong: one clear line and exit status 2."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


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


def not_empty(text: str) -> str:
    """A command's argument that names something: `type` of argparse.

    "", as "$FOLDER" is where nobody set it, would be the working directory.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return text


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_NO_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")  # torch's words


def memory_fault(error: BaseException) -> str | None:
    """What an allocation that failed says, in a line without advice; None of any other error.

    Known by words: torch, which is not loaded here, raises plain RuntimeErrors too.
    """
    said = " ".join(str(error).split())
    of_torch = isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)
    if not of_torch and not isinstance(error, MemoryError):
        return None
    told = ". ".join(said.split(". ")[:2]).rstrip(".")  # what was asked for; the rest is long
    return f"{type(error).__name__}: {told or 'out of memory'}"


def tell(text: str) -> None:
    """A line to the user, never into a progress bar; it ends nothing."""
    # its end in the same write: several processes may have one stderr
    tqdm.write(f"duet: {text}\n", file=sys.stderr, end="")
    sys.stderr.flush()


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a command; a UserError becomes one line on stderr and its exit status, and so does
    too little memory.

    Ctrl-C ends with 130, as shells expect (128 + the signal's number).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path is printed as the bytes that it is
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who read us, as `| head` does, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        tell(f"error: {' '.join(str(error).split())}")
        sys.exit(error.status)
    except (MemoryError, RuntimeError) as error:
        told = memory_fault(error)
        if told is None:
            raise
        tell(f"error: {told}: take a smaller batch size, or a device with more memory")
        sys.exit(2)
    except KeyboardInterrupt:
        tell("interrupted")
        sys.exit(130)
