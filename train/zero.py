"""ZeRO-2 (gradients and the optimizer's state in parts) and ZeRO-3 (weights too), by DeepSpeed.

Rajbhandari et al., arXiv 1910.02054.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Module, Parameter, ParameterList
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from duet.inference.empty import make_room
from duet.train.laid_out import laid_out
from duet.train.recompute import is_recomputed
from duet.train.sharding import InParts

_GROUP = 10**7  # weights
BUCKET = 500_000_000  # gradients that are sent at once


class Zero2(InParts):
    """DeepSpeed's engine clips, skips what is not finite, and steps, all in one call.

    It runs in the dtypes that the module has: mixed precision is autocast's, as with every engine.
    """

    stage = 2

    def __init__(self, accelerator: Accelerator, module: Module, block: type[Module]) -> None:
        super().__init__(accelerator, module, block)
        self._place()

    def _place(self) -> None:
        self.inner.to(self.accelerator.device)

    def prepare(self, optimizer: Optimizer, scheduler: LRScheduler, max_norm: float) -> None:
        self._params, self._groups = self.trained, optimizer.state_dict()["param_groups"]
        self.optimizer, self.scheduler = optimizer, scheduler
        self.module, *_ = _deepspeed(self.accelerator.device).initialize(
            model=self.inner,
            optimizer=optimizer,
            config=self._config(max_norm),
            dist_init_required=False,
        )

    def _config(self, max_norm: float) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,  # Duet counts them itself
            "managed_gradient_accumulation": False,  # an update is due when `step` is called
            "gradient_clipping": max_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": False,
                # DeepSpeed makes room for all of it, whatever there is to send
                "reduce_bucket_size": min(BUCKET, sum(self.shape(p).numel() for p in self.trained)),
            },
        }

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed skips by the gradient alone, so a loss that is not finite must show there
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self.module.backward(loss / self.accelerator.gradient_accumulation_steps)

    def clip(self) -> Tensor:
        """And steps, unless the norm is not finite."""
        self.module.step()
        return torch.as_tensor(self.module.get_global_grad_norm())

    def step(self, made: bool) -> None:
        if made:
            self.scheduler.step()

    def fill(self, parameter: Parameter, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        super().fill(parameter, value)
        safe_set_full_fp32_param(parameter, parameter.detach())

    def state_dict(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        def whole(parameter: Parameter, name: str) -> Tensor | None:
            value = safe_get_full_optimizer_state(parameter, name)  # collective
            main = self.accelerator.is_main_process
            return value.view(self.shape(parameter)).cpu() if main else None

        # the optimizer's own parameters are flat parts of many: they count updates alike
        flat = next(iter(self.optimizer.state.values()), {})
        sized = [name for name, value in flat.items() if isinstance(value, Tensor) and value.dim()]
        counts = {name: value for name, value in flat.items() if name not in sized}
        states = {
            i: counts | {name: whole(p, name) for name in sized}
            for i, p in enumerate(self._params)
            if flat
        }
        now = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        groups = [was | own for was, own in zip(self._groups, now, strict=True)]
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for group, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
            group.update((k, v) for k, v in saved.items() if k != "params")
        if not state["state"]:
            return
        first = state["state"][0]
        sized = [name for name, value in first.items() if value.dim()]
        for flat in self._flat():
            own = {name: torch.zeros_like(flat) for name in sized}
            self.optimizer.state[flat] = {n: v.clone() for n, v in first.items()} | own
        for i, parameter in enumerate(self._params):
            for name in sized:
                self._fill_state(parameter, state["state"][i][name], name)

    def _flat(self) -> list[Tensor]:
        """What the optimizer trains: this process's part of each group of parameters."""
        return self.module.optimizer.single_partition_of_fp32_groups

    def _fill_state(self, parameter: Parameter, value: Tensor, name: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self.module.optimizer._lazy_init_hp_params_optimizer_state()  # else it has no place yet
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)


class Zero3(Zero2):
    """Weights in parts too, gathered for the forward of the layer that has them."""

    stage, in_step, begins_empty = 3, True, True

    def _place(self) -> None:
        """A module without weights is parted module by module: `initialize` wants it whole."""
        if not any(p.is_meta for p in self.inner.parameters()):
            return super()._place()
        zero, config = _deepspeed(self.accelerator.device).zero, self._config(0)
        for module in self.inner.modules():
            if any(p.is_meta for p in module.parameters(recurse=False)):
                make_room(module, self.accelerator.device, recurse=False)
                own = ParameterList(module.parameters(recurse=False))
                zero.Init(own, config_dict_or_path=config)

    def _config(self, max_norm: float) -> dict[str, Any]:
        config = super()._config(max_norm)
        config["zero_optimization"] |= {
            # nothing stays gathered behind the back of who writes to the parts
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            # of a process's part: DeepSpeed begins with a gradient of a whole group's whole size
            "sub_group_size": _GROUP,
            # DeepSpeed's keeps no gathered weight for the backward, which a block that is computed
            # again does not either; but it rounds once more than torch's before it adds the bias
            "memory_efficient_linear": not is_recomputed(self.inner),
        }
        return config

    @contextmanager
    def gathered(self) -> Iterator[None]:
        import deepspeed

        hooks = self.module.optimizer.parameter_offload
        self.settle()
        with deepspeed.zero.GatheredParameters(list(self.inner.parameters())):
            hooks._remove_module_hooks()  # they would part each layer again after its forward
            hooks.forward_hooks, hooks.backward_hooks = [], []
            try:
                yield
            finally:
                hooks.setup_zero_stage3_hooks()

    def settle(self) -> None:
        self.module.optimizer.parameter_offload.partition_all_parameters()

    def held(self, parameter: Parameter) -> Tensor:
        return parameter.ds_tensor.detach().requires_grad_()

    def laid_out(self, parameters: Mapping[str, Parameter]) -> AbstractContextManager[Module]:
        return laid_out(self, parameters, _whole)

    def shape(self, parameter: Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def fill(self, parameter: Parameter, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        if not hasattr(parameter, "ds_tensor"):
            return InParts.fill(self, parameter, value)
        own = self._part_of(value, parameter)
        parameter.ds_tensor.detach().view(-1).copy_(own)
        safe_set_local_fp32_param(parameter, own)

    def _flat(self) -> list[Tensor]:
        return self.module.optimizer.fp32_partitioned_groups_flat

    def _fill_state(self, parameter: Parameter, value: Tensor, name: str) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, self._part_of(value, parameter), name)

    def _part_of(self, value: Tensor, parameter: Parameter) -> Tensor:
        """Every process has the whole `value`; the last one's part is padded."""
        part, rank = parameter.ds_tensor, self.accelerator.process_index
        flat = value.flatten()[rank * part.numel() :][: part.numel()].to(part)
        return torch.nn.functional.pad(flat, (0, part.numel() - flat.numel()))


def _whole(parameter: Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _deepspeed(device: torch.device) -> ModuleType:
    """An extra, slow to import, that picks its device at the import and talks a lot."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = import_module("deepspeed")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # its forward would end a GPU's autocast, in which sampling runs
    deepspeed.runtime.engine.autocast_if_enabled = lambda engine: nullcontext()
    if device.type == "cpu":  # gloo serves: its own all-reduce is compiled at the first use
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
