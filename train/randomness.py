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
    cuda: list[Tensor]  # of each GPU of the machine: a reward may draw on another than `gpu`
    gpu: int  # the process's own; on another machine it may have another number

    @classmethod
    def now(cls) -> "RandomState":
        cuda, gpu = [], 0
        if torch.cuda.is_initialized():
            cuda, gpu = torch.cuda.get_rng_state_all(), torch.cuda.current_device()
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, gpu)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda and torch.cuda.is_available():
            for gpu, state in enumerate(self.cuda[: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, gpu)
            torch.cuda.set_rng_state(self.cuda[self.gpu])

    def as_saved(self) -> dict[str, Any]:
        """By the names that accelerate gives them, and one more."""
        return {
            "random_state": self.python,
            "numpy_random_seed": self.numpy,
            "torch_manual_seed": self.torch,
            "torch_cuda_manual_seed": self.cuda,
            "gpu": self.gpu,
        }

    @classmethod
    def of_saved(cls, states: Mapping[str, Any], gpu: int) -> "RandomState":
        """`gpu`: the process's own in a file that does not say it, as accelerate's."""
        cuda = states.get("torch_cuda_manual_seed", [])
        return cls(
            states["random_state"],
            states["numpy_random_seed"],
            states["torch_manual_seed"],
            cuda,
            states.get("gpu", gpu % max(1, len(cuda))),
        )


@contextmanager
def unmoved() -> Iterator[None]:
    """What is drawn within, by a reward or the model, leaves no trace in what is drawn after."""
    before = RandomState.now()
    try:
        yield
    finally:
        before.restore()
