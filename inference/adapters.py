"""LoRA adapters on a module: put on, written, read back as they were trained, switched off."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import GlmImagePipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import Module

from duet.configs.digests import write_digests
from duet.configs.errors import UserError
from duet.inference.adapter_files import (
    INFO,
    AdapterInfo,
    SavedAdapter,
    peft_config,
    read_adapter,
)
from duet.inference.binding import bind
from duet.inference.filling import Filling, Plain
from duet.inference.parts import Part
from duet.inference.provenance import damaged


@dataclass(frozen=True)
class Bound:
    """What a LoRA trains."""

    layers: int
    parameters: int


def add_adapter(
    module: Module,
    part: Part,
    rank: int,
    alpha: float,
    targets: Sequence[str] = (),
    dropout: float = 0.0,
) -> Bound:
    """Put a fresh LoRA (B = 0: no change yet) on the module; only it requires gradients.

    It is in eval mode as the module is: nothing drops before training says so.

    Raises UserError when a target binds to no layer, or to one that is not trained.
    """
    names = list(targets or part.lora_targets)
    layers = bind(module, part, names)
    module.add_adapter(peft_config(rank, alpha, names, dropout))
    module.eval()
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(layers), "PEFT binds by another rule than `bind`"
    for parameter in trained:
        parameter.data = parameter.data.float()  # AdamW needs float32 masters
    return Bound(len(layers), sum(p.numel() for p in trained))


def save_adapter(module: Module, folder: Path, info: AdapterInfo) -> None:
    """Write the adapter where stock `load_adapter` (AR) or `load_lora_adapter` (DiT) reads it."""
    info.part.write_adapter(module, folder)
    bound = tuple(sorted(module.peft_config["default"].target_modules))  # none is left to defaults
    info = replace(info, lora=replace(info.lora, target_modules=bound))
    (folder / INFO).write_text(json.dumps(asdict(info), indent=2))
    write_digests(folder)


def load_adapter(pipeline: GlmImagePipeline, checkpoint: str | Path) -> AdapterInfo:
    """Put a checkpoint's adapter on its module, frozen.

    Raises UserError for a folder that holds none, a damaged one, or one of another base.
    """
    saved = read_adapter(checkpoint, pipeline.config["_name_or_path"])
    info, lora = saved.info, saved.info.lora
    module = info.part.module(pipeline)
    if getattr(module, "peft_config", None):
        raise UserError(f"adapter {str(checkpoint)!r}: the {info.stage} has an adapter already")
    add_adapter(module, info.part, lora.rank, lora.alpha, lora.target_modules)
    _fill(module, saved, checkpoint, Plain())
    module.requires_grad_(False).eval()
    return info


def restore_adapter(module: Module, checkpoint: str | Path, into: Filling = Plain()) -> None:
    """Give the module's adapter the very values that were saved.

    Raises UserError as `load_adapter`, but asks nothing of the base.
    """
    _fill(module, read_adapter(checkpoint), checkpoint, into)


def _fill(module: Module, saved: SavedAdapter, checkpoint: str | Path, into: Filling) -> None:
    """In float32: the libraries' own loaders round to the dtype of the base, which is another
    policy than the one that was trained.
    """
    own = {
        name.replace(".default.weight", ".weight"): parameter
        for name, parameter in module.named_parameters()
        if "lora_" in name
    }
    for name in sorted(own.keys() ^ saved.weights.keys()):
        raise damaged(checkpoint, KeyError(f"{name} stands on one side only"))
    for name, parameter in own.items():
        if into.shape(parameter) != saved.weights[name].shape:
            raise damaged(checkpoint, ValueError(f"{name} has another shape"))
        assert parameter.dtype == torch.float32, "add_adapter makes it so"
        into.fill(parameter, saved.weights[name])


@contextmanager
def adapter_disabled(module: Module) -> Iterator[None]:
    """The module as it was before its adapter. The module must have one."""
    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    assert layers, "without LoRA layers there is nothing to switch off"
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
