"""How saved values get into a module's parameters, whatever spreads them over processes."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter


class Filling(Protocol):
    def shape(self, parameter: Parameter) -> torch.Size:
        """Of the whole parameter."""

    def fill(self, parameter: Parameter, value: Tensor) -> None:
        """Give it the `value`, which is whole."""


class Plain:
    """Of a module that is whole in this process."""

    def shape(self, parameter: Parameter) -> torch.Size:
        return parameter.shape

    def fill(self, parameter: Parameter, value: Tensor) -> None:
        parameter.data.copy_(value)
