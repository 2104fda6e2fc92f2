"""Processes that end together and see each other's values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from duet.configs.errors import UserError, memory_fault

T = TypeVar("T")


@contextmanager
def together(accelerator: Accelerator | PartialState) -> Iterator[None]:
    """What ends one process, of whatever kind, ends all: none waits for it until a time-out.

    The others raise a UserError that tells of it. Inside, nothing may wait for other processes.
    """
    mine = None
    try:
        yield
    except BaseException as error:  # a signal and `sys.exit` too; raised again below
        mine = error
    own = None
    if mine is not None:  # a signal's status is that of all
        own = (memory_fault(mine) or str(mine) or type(mine).__name__, getattr(mine, "status", 2))
    told = gather_object([own])
    if mine is not None:
        raise mine
    for rank, ended in enumerate(told):
        if ended is not None:
            text, status = ended
            raise UserError(f"process {rank} ended: {text}", status)


def from_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What the main process's `work` returns, on all; what ends it ends all."""
    with together(accelerator):
        made = work() if accelerator.is_main_process else None
    return broadcast_object_list([made])[0]


_DONE = object()


def in_rounds(state: PartialState, work: Iterator[T]) -> Iterator[T]:
    """What this process's own `work` makes, an item a round; processes may have unequal numbers.

    What ends one ends all within the round, as `together` has it.
    """
    going = True
    while going:
        with together(state):
            made = next(work, _DONE)
        going = any(gather_object([made is not _DONE]))
        if made is not _DONE:
            yield made


def gather_rows(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The processes' rows, one after another, on the CPU; unequal lengths are fine."""
    if accelerator.num_processes == 1:
        return tensor.cpu()
    return torch.cat([torch.tensor(part) for part in gather_object([tensor.tolist()])])
