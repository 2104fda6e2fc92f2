"""The processes that a launcher started, where each holds a whole model and does its share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate import PartialState

from duet.inference.model import pick_device

# objects by gloo: who waits in NCCL for a process that is gone hears neither of it nor a signal
BACKEND = "cuda:nccl,cpu:gloo"

# one process may wait for another's part of the pictures, which is no fault; one that dies is
# the launcher's to see
_LONGEST_WAIT = timedelta(hours=6)


@contextmanager
def sharing(device: str = "auto") -> Iterator[PartialState]:
    """The processes, each with its own device; alone where no launcher is.

    `device`: as `model.device` has it.
    """
    state = joined(device, _LONGEST_WAIT)
    yield state
    state.destroy_process_group()  # not after a failure, which others may not have heard of


def joined(device: str, timeout: timedelta) -> PartialState:
    """The processes, or the one where no launcher is; each waits for another at most so long."""
    on_cpu, launched = pick_device(device).type == "cpu", os.environ.get("LOCAL_RANK", "-1") != "-1"
    backend = {"backend": BACKEND} if launched and not on_cpu else {}
    return PartialState(cpu=on_cpu, timeout=timeout, **backend)
