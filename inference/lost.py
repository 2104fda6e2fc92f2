"""Processes that are gone or hang: who, in one line, and how long others wait for them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from duet.configs.errors import UserError

ROLL_CALL_SECONDS = 5  # what a lost connection tells to one process, it tells to all at once
_GLOO = "/gloo/"  # its errors are RuntimeErrors that begin with the file of its source


class Lost(UserError):
    """Other processes do not answer: nothing that needs them can be done any more."""


def wait_at_most(seconds: int) -> None:
    """In every group of processes, those too that an engine has made for itself: torch gives
    them its own time-out, not that of the first group."""
    for group in _world.pg_map:
        dist.set_timeout(timedelta(seconds=seconds), group)


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """What a collective raises for want of another process leaves as Lost."""
    try:
        yield
    except RuntimeError as error:
        lost = named(error)
        if lost is error:
            raise
        raise lost from error


def named(error: BaseException) -> BaseException:
    """Lost where a collective raised it for want of another process; else the error itself."""
    of_others = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _GLOO in str(error)
    )
    if not of_others:
        return error
    return Lost(f"{_who()}: its own lines above, or its machine's log, have why")


def _who() -> str:
    """All that are left come here: who does not is it."""
    if not dist.is_initialized():
        return "a process is gone or hangs"
    mine, everyone = dist.get_rank(), range(dist.get_world_size())
    try:
        store = dist.group.WORLD.get_group_store()
        store.set(_key(mine), "")
        end = time.monotonic() + ROLL_CALL_SECONDS
        while missing := [rank for rank in everyone if not store.check([_key(rank)])]:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
    except RuntimeError:  # the store was the lost process's
        return "a process is gone or hangs"
    if not missing:
        return "the processes have lost their connections"
    numbers = ", ".join(map(str, missing))
    return f"process {numbers} is gone or hangs"


def _key(rank: int) -> str:
    return f"duet/left/{rank}"
