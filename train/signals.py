"""SIGINT, SIGTERM, SIGHUP and SIGUSR1, heeded where a run may end."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

# of users, terminals, and of schedulers that want their machine back (SLURM, --signal=USR1)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_TOLD = "duet: {}: the run ends at the next safe place; a second signal ends it at once"
_SAME_SECONDS = 2.0  # a launcher passes on what its terminal has sent to all already


class Stopped(BaseException):
    """A signal ended the run. No Exception: whoever catches those must not swallow it."""

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.status = 128 + number  # what shells expect
        super().__init__(f"{self.name} ended the run")


class Signals:
    """The first signal waits for the next place where the run may end; a second one kills."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the signal that came
        self._came = 0.0
        self._raises = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, signals come here; what was ignored before (nohup) stays so."""
        before = {n: signal.getsignal(n) for n in _ENDING}
        caught = {n: h for n, h in before.items() if h != signal.SIG_IGN}
        try:
            for number in caught:
                signal.signal(number, self._receive)
            yield
        finally:
            for number, handler in caught.items():
                signal.signal(number, handler)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """While open, a signal ends the block at once, and one that waits does so on entry.

        Within `together` alone: there no process waits for another, and what ends one ends all.
        """
        self._raises = True
        try:
            if self.number is not None:
                raise Stopped(self.number)
            yield
        finally:
            self._raises = False

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.number is not None:
            if now - self._came > _SAME_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self.number, self._came = number, now
        # not `print`: a handler may stand inside another one
        os.write(2, f"{_TOLD.format(signal.Signals(number).name)}\n".encode())
        if self._raises:
            self._raises = False
            raise Stopped(number)
