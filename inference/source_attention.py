"""What a picture's pixels attend to of its sources: keys and values of every layer.

They come from trained layers, so they are made anew by the weights of the moment for each
sampling and each scoring, with gradient where the caller wants one, and kept by nobody.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from duet.inference.rollout import Conditions
from duet.inference.sources import Source


class _Written:
    """A layer's keys and values [1, S, heads, D] of one source, as `GlmImageAttnProcessor` gives
    them.

    Gradient checkpointing runs a layer again in backward: what it gives then nobody reads.
    """

    mode = "write"
    keys: Tensor | None = None
    values: Tensor | None = None

    def store(self, keys: Tensor, values: Tensor) -> None:
        if self.keys is None:
            self.keys, self.values = keys, values


class _Layers:
    """Stands for `GlmImageKVCache`, of a source that is being read."""

    def __init__(self) -> None:
        self.written: dict[int, _Written] = {}

    def __getitem__(self, layer: int) -> _Written:
        return self.written.setdefault(layer, _Written())


class _Layer:
    """What a layer reads.

    No dataclass: FSDP2 would take its tensors for inputs of the layer, after whose gradients it
    reduces the layer's own, and processes without sources have none.
    """

    mode = "read"

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor) -> None:
        """`keys`, `values`: [U, S, heads, D] of U groups of sources; `rows`: int64 [B], each
        sample's group."""
        self.keys, self.values, self.rows = keys, values, rows

    def get(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """In front of the samples' own [B, L, heads, D], which change nothing here."""
        return (
            torch.cat([self.keys.index_select(0, self.rows), keys], 1),
            torch.cat([self.values.index_select(0, self.rows), values], 1),
        )


class SourceAttention:
    """Stands for `GlmImageKVCache` in the conditional passes of B samples."""

    def __init__(self, layers: list[_Layer], idle: Tensor) -> None:
        """`idle`: scalar 0, by way of what the passes give beside their keys and values."""
        self.layers, self.idle = layers, idle

    def __getitem__(self, layer: int) -> _Layer:
        return self.layers[layer]


@dataclass(frozen=True)
class Seen:
    """What the DiT sees besides latents."""

    given: Conditions  # on the device
    sources: SourceAttention | None  # None: there are none


def see(dit: Module, given: Conditions) -> Seen:
    """Run each source through the DiT once: at timestep 0, with its own prior tokens and no text
    (as `GlmImagePipeline`).
    """
    return Seen(given, None if given.sources is None else _attention(dit, given))


def passes(given: Conditions) -> int:
    """How many forwards of the DiT `see` runs."""
    return sum(map(len, _groups(given).values()))


def _groups(given: Conditions) -> dict[int, tuple[Source, ...]]:
    """The sources, once a group: all of its samples have one tuple."""
    return {id(sources): sources for sources in given.sources or ()}


def _attention(dit: Module, given: Conditions) -> SourceAttention:
    groups, idle = _groups(given), torch.zeros((), device=given.prior.device)
    order = list(groups)
    rows = torch.tensor([order.index(id(s)) for s in given.sources], device=given.prior.device)
    read: list[list[_Layers]] = []
    for sources in groups.values():
        read.append([])
        for source in sources:
            layers, output = _read(dit, source, given)
            read[-1].append(layers)
            idle = idle + 0 * output.float().sum()
    layers = []
    for layer in read[0][0].written:
        keys, values = (
            torch.cat(
                [
                    torch.cat([getattr(source[layer], name) for source in sources], 1)
                    for sources in read
                ]
            )
            for name in ("keys", "values")
        )
        layers.append(_Layer(keys, values, rows))
    return SourceAttention(layers, idle)


def _read(dit: Module, source: Source, given: Conditions) -> tuple[_Layers, Tensor]:
    device, dtype = given.glyphs.device, given.glyphs.dtype
    own, size = source.to(device), source.size
    tokens, layers = own.tokens[None], _Layers()
    [output] = dit(
        hidden_states=own.latents[None].to(dtype),
        encoder_hidden_states=given.glyphs[:1, :0],
        prior_token_id=tokens,
        prior_token_drop=torch.zeros_like(tokens, dtype=torch.bool),
        timestep=torch.zeros(1, device=device),
        target_size=torch.tensor([[size.height, size.width]], dtype=dtype, device=device),
        crop_coords=torch.zeros(1, 2, dtype=dtype, device=device),
        kv_caches=layers,
        return_dict=False,
    )
    return layers, output
