"""Parameters that lie in parts, whole for a while on the process that writes them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.nn import Module, Parameter

from duet.train.sharding import Sharding


@contextmanager
def laid_out(
    sharding: Sharding, parameters: Mapping[str, Parameter], whole: Callable[[Parameter], Tensor]
) -> Iterator[None]:
    """One after another is gathered by `whole`, a collective, and kept by the main process on
    the CPU.
    """
    main, values = sharding.accelerator.is_main_process, {}
    for name, parameter in parameters.items():
        value = whole(parameter)
        if main:
            values[name] = Parameter(value.cpu(), parameter.requires_grad)
        del value  # before the next one is gathered
    _put(sharding.inner, values)
    try:
        yield
    finally:
        _put(sharding.inner, {name: parameters[name] for name in values})


def _put(module: Module, parameters: Mapping[str, Parameter]) -> None:
    """Past `register_parameter`: engines watch it."""
    for name, parameter in parameters.items():
        owner, _, last = name.rpartition(".")
        module.get_submodule(owner)._parameters[last] = parameter
