"""Other values in the place of a module's own, for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    """On the CPU, in their own dtype."""
    return [p.detach().to("cpu", copy=True) for p in parameters]


@contextmanager
def swapped(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """While open the parameters have other values; then their own again, bit for bit.

    Their own wait on the CPU. A graph that was made before cannot go backward afterwards:
    autograd refuses, for it sees that the weights were written to.
    """
    own = copies(parameters)
    try:
        _write(parameters, values)
        yield
    finally:
        _write(parameters, own)


@torch.no_grad()
def _write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
