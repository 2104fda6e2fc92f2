"""A module that lies in parts, whole for once: on the process that writes it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import Module, Parameter

from duet.train.sharding import Sharding


@contextmanager
def laid_out(
    sharding: Sharding, parameters: Mapping[str, Parameter], whole: Callable[[Parameter], Tensor]
) -> Iterator[Module]:
    """A twin of the module with these `parameters`, by name: one after another is gathered by
    `whole`, a collective, and kept by the main process on the CPU. The others are on meta.
    """
    main, values = sharding.accelerator.is_main_process, {}
    for name, parameter in parameters.items():
        value = whole(parameter)
        if main:
            values[name] = Parameter(value.cpu(), parameter.requires_grad)
        del value  # before the next one is gathered
    yield _twin(sharding.inner, values)


def _twin(module: Module, values: Mapping[str, Parameter], prefix: str = "") -> Module:
    """Of its own class and with its settings, without what engines hook onto it."""
    kind = next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))
    twin = kind.__new__(kind)
    Module.__init__(twin)
    fresh = dict(twin.__dict__)
    twin.__dict__.update({k: v for k, v in module.__dict__.items() if k not in fresh})
    twin.training = module.training
    twin._buffers.update(module._buffers)
    twin._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    for name, own in module._parameters.items():
        value = values.get(prefix + name)
        twin._parameters[name] = _meta(own) if value is None else value
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _twin(child, values, f"{prefix}{name}.")
    return twin


def _meta(parameter: Parameter | None) -> Parameter | None:
    return None if parameter is None else Parameter(parameter.detach().to("meta"), False)
