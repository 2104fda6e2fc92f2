"""One writer at a time in a folder."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import wraps
from operator import attrgetter
from pathlib import Path

from accelerate import PartialState

from duet.configs.errors import UserError, tell
from duet.configs.outputs import make_folder
from duet.configs.schema import RunConfig
from duet.inference.lost import naming_the_lost
from duet.inference.processes import joined
from duet.inference.together import together
from duet.train.environment import processes_alone

Work = Callable[[RunConfig], Path]
_LOCK = ".lock"


@contextmanager
def locked(name: str, folder: Path) -> Iterator[None]:
    """While open, no other process can lock the folder; `name` is its setting's, for messages.

    The system gives the lock back when its process ends, however that is: a stale one cannot
    be. The file stays, for unlinking it would let two waiters lock two files. Over NFS it holds
    between machines as far as the server's lock service does.
    Raises UserError while another process has it, and where nothing can be written.
    """
    make_folder(name, folder)
    try:
        file = (folder / _LOCK).open("a+")
    except OSError as error:
        raise UserError(f"{name} = {str(folder)!r} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{name} = {str(folder)!r} is in use by {holder}: wait for its end, "
                "or give another folder"
            ) from error
        except OSError as error:  # some cluster file systems have no locks
            told = f"{name} = {str(folder)!r} cannot be locked ({error.strerror})"
            tell(f"{told}: see that no second run uses it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextmanager
def locked_for_all(state: PartialState, name: str, folder: Path) -> Iterator[None]:
    """`locked` by the main one of several processes: all end where it cannot."""
    with ExitStack() as held:
        with together(state):
            if state.is_main_process:
                held.enter_context(locked(name, folder))
        yield


def alone(name: str) -> Callable[[Work], Work]:
    """For work that writes to the folder which the setting `name` tells: while it runs, no other
    does.
    """

    def decorate(work: Work) -> Work:
        @wraps(work)
        def run(config: RunConfig) -> Path:
            with processes_alone():
                state = joined(config.model.device, timedelta(seconds=config.train.ddp_timeout))
            with naming_the_lost(), locked_for_all(state, name, Path(attrgetter(name)(config))):
                return work(config)

        return run

    return decorate
