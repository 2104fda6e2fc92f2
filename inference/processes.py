"""The processes that a launcher started, where each holds a whole model and does its share."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate import PartialState

from duet.inference.model import pick_device

# one process may wait for another's part of the pictures, which is no fault; one that dies is
# the launcher's to see
_LONGEST_WAIT = timedelta(hours=6)


@contextmanager
def sharing(device: str = "auto") -> Iterator[PartialState]:
    """The processes, each with its own device; alone where no launcher is.

    `device`: as `model.device` has it.
    """
    on_cpu = pick_device(device).type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=_LONGEST_WAIT)
    yield state
    state.destroy_process_group()  # not after a failure, which others may not have heard of
