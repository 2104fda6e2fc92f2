"""What a picture's pixels attend to of its sources: keys and values of every layer.

They come from trained layers, so they are made anew by the weights of the moment for each
sampling and each scoring, with gradient where the caller wants one, and kept by nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from duet.inference.rollout import Conditions
from duet.inference.sources import Source


class _Written:
    """A layer's keys and values [U, S, heads, D] of U sources, as `GlmImageAttnProcessor` gives
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
    """Stands for `GlmImageKVCache`, of sources that are being read."""

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
    """Run the sources through the DiT once: at timestep 0, each with its own prior tokens, and no
    text (as `GlmImagePipeline`).
    """
    return Seen(given, None if given.sources is None else _attention(dit, given))


def passes(given: Conditions) -> int:
    """How many forwards of the DiT `see` runs."""
    return len(given.sources[0]) if given.sources else 0


def _attention(dit: Module, given: Conditions) -> SourceAttention:
    groups = {id(sources): sources for sources in given.sources}  # of one group, one tuple
    order, idle = list(groups), torch.zeros((), device=given.prior.device)
    rows = torch.tensor([order.index(id(s)) for s in given.sources], device=given.prior.device)
    # in one batch all groups' first sources have one size, and so have their second ones
    read: list[_Layers] = []
    for sources in zip(*groups.values(), strict=True):
        layers, output = _read(dit, sources, given)
        read.append(layers)
        idle = idle + 0 * output.float().sum()
    layers = []
    for layer in read[0].written:
        keys, values = (
            torch.cat([getattr(source[layer], name) for source in read], 1)
            for name in ("keys", "values")
        )
        layers.append(_Layer(keys, values, rows))
    return SourceAttention(layers, idle)


def _read(dit: Module, sources: Sequence[Source], given: Conditions) -> tuple[_Layers, Tensor]:
    """U sources of one size."""
    device, dtype, count = given.glyphs.device, given.glyphs.dtype, len(sources)
    own, size, layers = [source.to(device) for source in sources], sources[0].size, _Layers()
    tokens = torch.stack([source.tokens for source in own])
    sides = torch.tensor([[size.height, size.width]], dtype=dtype, device=device)
    [output] = dit(
        hidden_states=torch.stack([source.latents for source in own]).to(dtype),
        encoder_hidden_states=given.glyphs[:1, :0].expand(count, -1, -1),
        prior_token_id=tokens,
        prior_token_drop=torch.zeros_like(tokens, dtype=torch.bool),
        timestep=torch.zeros(count, device=device),
        target_size=sides.expand(count, -1),
        crop_coords=torch.zeros_like(sides).expand(count, -1),
        kv_caches=layers,
        return_dict=False,
    )
    return layers, output
