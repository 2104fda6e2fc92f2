"""How a policy's module and optimizer are spread over processes; here whole on each, as DDP does.

Engines that keep a part on each process build on it: `fully_sharded.py` and `zero.py`.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Sharding:
    """A module as accelerate prepares it: alone on one process, or DDP over several."""

    in_step = False  # whether processes must run equal numbers of forwards
    movable = True  # whether the module may wait on the CPU
    # whether the module may come without weights, so that no process ever holds all of them
    begins_empty = False

    def __init__(self, accelerator: Accelerator, module: Module, block: type[Module]) -> None:
        """`block`: the module's repeated layer."""
        self.accelerator, self.inner = accelerator, module

    def prepare(self, optimizer: Optimizer, scheduler: LRScheduler, max_norm: float) -> None:
        """`optimizer`: of the trained parameters. From here on `module` is there."""
        self.max_norm = max_norm
        self.module, self.optimizer, self.scheduler = self.accelerator.prepare(
            self.inner, optimizer, scheduler
        )

    @property
    def trained(self) -> list[Parameter]:
        return [p for p in self.inner.parameters() if p.requires_grad]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While open the module is whole on every process: its forwards wait for no other.

        Collective. No gradients within.
        """
        yield

    def accumulating(self) -> AbstractContextManager[None]:
        """Around a micro-batch; accelerate counts them up to an update."""
        return self.accelerator.accumulate(self.module)

    def synchronising(self, last: bool) -> AbstractContextManager[None]:
        """Around a backward pass; the `last` of a micro-batch shares gradients, if one is due."""
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self) -> Tensor:
        """The norm of the gradient of all processes, before clipping: the same on all."""
        return self.accelerator.clip_grad_norm_(self.trained, self.max_norm)

    def step(self, made: bool) -> None:
        """The optimizer's and the schedule's, or neither where the update is not to be made."""
        if not made:
            self.optimizer.zero_grad()
        if made or self.accelerator.scaler is not None:  # the scaler lowers its scale
            self.optimizer.step()
        if made:
            self.scheduler.step()
        self.optimizer.zero_grad()

    def held(self, parameter: Parameter) -> Tensor:
        """What this process holds of a parameter, to be read and written; requires gradients."""
        return parameter

    @contextmanager
    def laid_out(self, parameters: Mapping[str, Parameter]) -> Iterator[Module]:
        """The module to write: on the main process its `parameters`, by name, are whole.

        Collective, on entry alone. No forward within.
        """
        yield self.inner

    def shape(self, parameter: Parameter) -> torch.Size:
        """Of the whole parameter."""
        return parameter.shape

    def fill(self, parameter: Parameter, value: Tensor) -> None:
        """Give a parameter, or a buffer, a whole value, of which each process takes its part."""
        parameter.data.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, as one process alone would have it: the main one gets it. Collective."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        # torch sends moments to where a parameter is, which may wait on the CPU (`movable`)
        for own in self.optimizer.state.values():
            sized = {n: v for n, v in own.items() if isinstance(v, Tensor) and v.dim()}
            own.update((n, v.to(self.accelerator.device)) for n, v in sized.items())

    def moments(self) -> list[Tensor]:
        """What this process holds of the optimizer's state."""
        states = self.optimizer.state.values()
        return [s for state in states for s in state.values() if isinstance(s, Tensor)]

    def settle(self) -> None:
        """After it the next forward runs by what is `held`, also by what was written there."""


class InParts(Sharding):
    """What both engines have in common that keep a part of the training on each process."""

    movable = False

    def accumulating(self) -> AbstractContextManager[None]:
        return self.accelerator.accumulate()

    def synchronising(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()  # a whole gradient would not fit: its parts add up
