"""The global random states that a checkpoint holds, to go back to."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Those that a process draws from. Duet's own draws are seeded by step and sample; a reward's,
    and dropout's, may come from here.
    """

    python: tuple[Any, ...]
    numpy: dict[str, Any] | tuple[Any, ...]
    torch: Tensor
    # of the process's own GPU, whichever it is on its machine; the others are other processes'
    cuda: Tensor | None

    @classmethod
    def now(cls) -> "RandomState":
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.cuda)

    def as_saved(self) -> dict[str, Any]:
        """By the names that accelerate gives them."""
        cuda = {} if self.cuda is None else {"torch_cuda_manual_seed": [self.cuda]}
        return {
            "random_state": self.python,
            "numpy_random_seed": self.numpy,
            "torch_manual_seed": self.torch,
            **cuda,
        }

    @classmethod
    def of_saved(cls, states: Mapping[str, Any], process: int) -> "RandomState":
        """What `process` saved; accelerate itself has those of all GPUs of a machine."""
        cuda = states.get("torch_cuda_manual_seed") or [None]
        return cls(
            states["random_state"],
            states["numpy_random_seed"],
            states["torch_manual_seed"],
            cuda[process % len(cuda)],
        )


@contextmanager
def unmoved() -> Iterator[None]:
    """What is drawn within, by a reward or the model, leaves no trace in what is drawn after."""
    before = RandomState.now()
    try:
        yield
    finally:
        before.restore()
