"""The global random states that a checkpoint holds, to go back to."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Those that accelerate writes. Duet's own draws are seeded by step and sample; a reward's,
    and dropout's, may come from here.
    """

    python: tuple[Any, ...]
    numpy: dict[str, Any] | tuple[Any, ...]
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> "RandomState":
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextmanager
def unmoved() -> Iterator[None]:
    """What is drawn within, by a reward or the model, leaves no trace in what is drawn after."""
    before = RandomState.now()
    try:
        yield
    finally:
        before.restore()
