"""Training in float64 where it says float32: what differs then is no rounding."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from duet.inference.shapes import default_dtype
from duet.train import policy, setup

_SINGLE = torch.float32


@contextmanager
def in_double_precision() -> Iterator[None]:
    """While open, what is made or cast in float32 is in float64, in libraries too."""
    load, fill = setup.load_pipeline, policy.fill_weights
    patches = [
        (torch, "float32", torch.float64),
        (torch, "float", torch.float64),
        (torch.Tensor, "float", torch.Tensor.double),
        (torch.nn.Module, "float", torch.nn.Module.double),
        (setup, "load_pipeline", lambda *given: _as_stored(load, *given).to(torch.float64)),
        (policy, "fill_weights", lambda *given: _as_stored(fill, *given)),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(default_dtype(torch.float64))
        yield


def _as_stored(read: Callable[..., Any], *given: Any) -> Any:
    """Files of weights are in float32, and are read by that name."""
    with mock.patch.object(torch, "float32", _SINGLE), default_dtype(_SINGLE):
        return read(*given)
