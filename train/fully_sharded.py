"""FSDP2: parameters, gradients and the optimizer's state in parts, by torch's `fully_shard`.

Zhao et al., arXiv 2304.11277; https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module, Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from duet.inference.empty import make_room
from duet.train.environment import hybrid
from duet.train.laid_out import laid_out
from duet.train.sharding import InParts


class FullySharded(InParts):
    """Block by block."""

    in_step = begins_empty = True

    def __init__(self, accelerator: Accelerator, module: Module, block: type[Module]) -> None:
        super().__init__(accelerator, module, block)
        mesh, empty = _mesh(accelerator), any(p.is_meta for p in module.parameters())
        if not empty:
            module.to(accelerator.device)
        for layer in [m for m in module.modules() if isinstance(m, block)]:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        if empty:
            make_room(module, accelerator.device)
        # torch wants the outermost to run first, and sampling runs inner ones alone
        module.begin = lambda: None
        register_fsdp_forward_method(module, "begin")
        module.begin()
        module.reshard()

    def prepare(self, optimizer: Optimizer, scheduler: LRScheduler, max_norm: float) -> None:
        self.max_norm, self.module = max_norm, self.inner
        self.optimizer, self.scheduler = self.accelerator.prepare(optimizer, scheduler)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        layers = self._layers()
        self.settle()
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in layers:
                # the outermost one's are needed again at once, in backward
                layer.set_reshard_after_forward(layer is not self.inner, recurse=False)
                layer.reshard()

    def _layers(self) -> list[FSDPModule]:
        return [m for m in self.inner.modules() if isinstance(m, FSDPModule)]

    def clip(self) -> Tensor:
        return clip_grad_norm_(self.trained, self.max_norm).full_tensor()

    def held(self, parameter: Parameter) -> Tensor:
        return parameter.to_local().detach().requires_grad_()

    def laid_out(self, parameters: Mapping[str, Parameter]) -> AbstractContextManager[Module]:
        return laid_out(self, parameters, lambda p: p.detach().full_tensor())

    def fill(self, parameter: Parameter, value: Tensor) -> None:
        if isinstance(parameter, DTensor):
            value = _part_of(value, parameter)
        super().fill(parameter, value)

    def settle(self) -> None:
        for layer in self._layers():
            layer.reshard()

    def state_dict(self) -> dict[str, Any]:
        main = self.accelerator.is_main_process

        def gather(_: int, value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            whole = value.full_tensor()  # collective
            return whole.cpu() if main else None

        return _each(self.optimizer.state_dict(), gather)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        trained = self.trained

        def part(place: int, value: Any) -> Any:
            alike = isinstance(value, Tensor) and value.shape == trained[place].shape
            return _part_of(value, trained[place]) if alike else value

        self.optimizer.load_state_dict(_each(state, part))

    def moments(self) -> list[Tensor]:
        return [m.to_local() if isinstance(m, DTensor) else m for m in super().moments()]


def _mesh(accelerator: Accelerator) -> DeviceMesh:
    """Parts over all processes, or over those of a machine, and machines hold the same."""
    kind, processes = accelerator.device.type, accelerator.num_processes
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if not hybrid() or local == processes:
        return init_device_mesh(kind, (processes,))
    return init_device_mesh(kind, (processes // local, local), mesh_dim_names=("copies", "parts"))


def _part_of(value: Tensor, parameter: DTensor) -> DTensor:
    """Every process has the whole `value`; none is sent."""
    mesh = parameter.device_mesh
    return distribute_tensor(value, mesh, parameter.placements, src_data_rank=None)


def _each(state: dict[str, Any], change: Callable[[int, Any], Any]) -> dict[str, Any]:
    """An optimizer's state_dict with other values; `change` is told the parameter's number."""
    states = {i: {k: change(i, v) for k, v in own.items()} for i, own in state["state"].items()}
    return state | {"state": states}
