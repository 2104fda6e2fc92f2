"""What a run tells: `train.log` has all of it, the terminal what its progress bar has not."""

import logging
import sys
from pathlib import Path

from duet.configs.errors import tell

LOG_FILE = "train.log"


class Journal:
    """The main process tells; the others' calls do nothing."""

    def __init__(self, folder: Path, main: bool) -> None:
        """`folder`: of the run; the log of an earlier start in it is gone on with."""
        self._log = logging.Logger("duet.train")  # its own: a library's root handlers stay out
        if not main:
            self._log.addHandler(logging.NullHandler())
            return
        file = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._log.addHandler(file)
        self._log.addHandler(_Terminal(logging.INFO))

    def tell(self, text: str) -> None:
        self._log.info(text)

    def tell_step(self, text: str) -> None:
        """A line a step, where no bar shows it."""
        self._log.log(logging.DEBUG if sys.stderr.isatty() else logging.INFO, text)

    def record(self, text: str, error: BaseException) -> None:
        """An end and where it came from, to the file alone: the command prints its one line."""
        self._log.debug(text, exc_info=error)

    def close(self) -> None:
        for handler in self._log.handlers:
            handler.close()


class _Terminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(record.getMessage())
