"""What code would hold and do on a GPU, found by running it on tensors without values.

Everything runs on PyTorch's fake CPU tensors under the CPU's autocast, with flash attention
in attention's place and CUDA's rule that normalisations run in float32.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten, prim = torch.ops.aten, torch.ops.prim


@dataclass(frozen=True)
class Kernel:
    """One operation on the device."""

    flops: int
    bytes: int  # read and written


@dataclass(frozen=True)
class Stretch:
    """Of the code that ran."""

    live: int  # bytes at its end
    peak: int  # bytes, the most at once
    kernels: Counter[Kernel]


def repeated(kernels: Counter[Kernel], times: int) -> Counter[Kernel]:
    return Counter({kernel: count * times for kernel, count in kernels.items()})


class Meter(TorchDispatchMode):
    """Follows the bytes that are alive and the kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0  # bytes
        self.kernels: Counter[Kernel] = Counter()
        self._seen: set[int] = set()

    def stretch(self) -> Stretch:
        """What was since the last call."""
        stretch = Stretch(self.live, self.peak, self.kernels)
        self.peak, self.kernels = self.live, Counter()
        return stretch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is prim.device.default:  # two of three calls, and no work
            return args[0].fake_device
        if func.is_view:
            return func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs))
        picked = _masked(func, args)
        out = func(*args, **(kwargs or {})) if picked is None else picked
        made = _tensors(out)
        old = {t.untyped_storage()._cdata for t in given}
        new = [t for t in made if t.untyped_storage()._cdata not in old]
        for tensor in new:
            self._follow(tensor.untyped_storage())
        if (new and given) or func._schema.is_mutable:
            self._count(func, args, kwargs or {}, out, given, made)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def _count(self, func, args, kwargs, out, given: list[Tensor], made: list[Tensor]) -> None:
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        # a look-up reads the rows that it gives
        touched = [*made, *(made if func is aten.embedding.default else given)]
        self.kernels[Kernel(flops, sum(t.nbytes for t in touched))] += 1


def _tensors(tree) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for part in tree for tensor in _tensors(part)]


def _masked(func, args) -> Tensor | None:
    """How many `x[mask]` picks only values tell: here all."""
    if func is not aten.index.Tensor or args[1][0] is None or args[1][0].dtype != torch.bool:
        return None
    x, mask = args[0], args[1][0]
    return x.new_empty(mask.numel(), *x.shape[mask.dim() :])


@contextmanager
def without_values(module: Module) -> Iterator[Meter]:
    """While open, tensors have no values, the module's neither, and a meter runs.

    `module`: on the meta device; it is of no use afterwards.
    """
    with (
        mock.patch.object(F, "scaled_dot_product_attention", _flash_attention),
        mock.patch.object(F, "layer_norm", _in_float32(F.layer_norm)),
        mock.patch.object(F, "group_norm", _in_float32(F.group_norm)),
        FakeTensorMode(),
        Meter() as meter,
    ):
        _imitate(module)
        yield meter


def _flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
    return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]


def _in_float32(norm):
    def run(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args = [_float(a) for a in args]
            kwargs = {name: _float(a) for name, a in kwargs.items()}
        return norm(*args, **kwargs)

    return run


def _float(value):
    return value.float() if isinstance(value, Tensor) else value


def _imitate(module: Module) -> None:
    """Parameters and buffers on the CPU without values, tied as they are."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in made:
                    made[id(tensor)] = _like(tensor)
                table[name] = None if tensor is None else made[id(tensor)]


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
