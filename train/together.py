"""Processes that end together and see each other's values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from duet.configs.errors import UserError


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """What ends one process, of whatever kind, ends all: none waits for it until a time-out.

    The others raise a UserError that tells of it. Inside, nothing may wait for other processes.
    """
    mine = None
    try:
        yield
    except BaseException as error:  # a signal and `sys.exit` too; raised again below
        mine = error
    told = gather_object([None if mine is None else str(mine) or type(mine).__name__])
    if mine is not None:
        raise mine
    for rank, text in enumerate(told):
        if text is not None:
            raise UserError(f"process {rank} ended: {text}")


def gather_rows(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The processes' rows, one after another, on the CPU; unequal lengths are fine."""
    if accelerator.num_processes == 1:
        return tensor.cpu()
    return torch.cat([torch.tensor(part) for part in gather_object([tensor.tolist()])])
