"""N samples side by side: chosen, split and joined without naming their fields."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch


class Samples:
    """Base of a dataclass of N samples: the fields in `per_sample` have N rows each."""

    per_sample: ClassVar[tuple[str, ...]]

    def __len__(self) -> int:
        return len(getattr(self, self.per_sample[0]))

    def select(self, index: Sequence[int]) -> Self:
        """Some of the samples; consecutive ones are views of the same memory."""
        rows = {name: getattr(self, name) for name in self.per_sample}
        return replace(self, **{n: _take(value, index) for n, value in rows.items()})

    def split(self) -> list[Self]:
        """Each sample by itself."""
        return [self.select([n]) for n in range(len(self))]


Kind = TypeVar("Kind", bound=Samples)


def join(parts: Sequence[Kind]) -> Kind:
    """The samples of all parts, which share everything else."""
    joined = {n: _join([getattr(p, n) for p in parts]) for n in parts[0].per_sample}
    return replace(parts[0], **joined)


def _take(value: Any, index: Sequence[int]) -> Any:
    if value is None:
        return None
    if isinstance(value, Samples):
        return value.select(index)
    if isinstance(value, list):
        return [value[i] for i in index]
    start, stop = index[0], index[0] + len(index)
    return value[start:stop] if list(index) == list(range(start, stop)) else value[list(index)]


def _join(values: list) -> Any:
    if values[0] is None:
        return None
    if isinstance(values[0], Samples):
        return join(values)
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    return np.concatenate(values) if isinstance(values[0], np.ndarray) else torch.cat(values)
