"""An adapter's folder: what stands in it, read and checked without its model."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from duet.configs.digests import Damaged, check_digests, refuse_older
from duet.configs.errors import UserError
from duet.configs.policy_schema import LoraConfig
from duet.inference.binding import is_target
from duet.inference.provenance import Provenance, damaged, read_provenance, require_base

INFO = "duet_adapter.json"
_KEY = re.compile(r"(.+)\.lora_([AB])\.weight")
# of PEFT's config: what changes nothing in a forward pass without gradient
_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "revision",
    "task_type",
}


@dataclass(frozen=True)
class AdapterInfo(Provenance):
    """What stands beside an adapter's weights."""

    lora: LoraConfig


@dataclass(frozen=True)
class SavedAdapter:
    info: AdapterInfo
    weights: dict[str, Tensor]  # float32, by their names in the module: LAYER.lora_A.weight, ...


def read_adapter(checkpoint: str | Path, model_path: str | None = None) -> SavedAdapter:
    """An adapter that is whole, finite and agrees with itself; with `model_path`, of that base.

    Raises UserError for any other.
    """
    info, folder = adapter_info(checkpoint), adapter_folder(checkpoint)
    part = info.part
    if model_path is not None:
        require_base(info, checkpoint, model_path)
    try:
        _check_config(part.read_config(folder), info)
        saved = load_file(folder / part.weights_file)
        weights = {name.removeprefix(part.prefix): value for name, value in saved.items()}
        _check_weights(weights, info)
        check_digests(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise damaged(checkpoint, error) from error
    return SavedAdapter(info, weights)


def check_adapter(checkpoint: str | Path, model_path: str) -> AdapterInfo:
    """What can be wrong with an adapter, told before the model's weights are read.

    Raises UserError as `read_adapter`.
    """
    return read_adapter(checkpoint, model_path).info


def adapter_folder(checkpoint: str | Path) -> Path:
    """Where the adapter lies: in the checkpoint's `adapter`, or the folder itself."""
    folder = Path(checkpoint)
    return folder / "adapter" if (folder / "adapter").is_dir() else folder


def adapter_info(checkpoint: str | Path) -> AdapterInfo:
    """Which part it is for, without reading its weights. Raises UserError as `read_adapter`."""
    folder = adapter_folder(checkpoint)
    if any(folder.glob("*.safetensors")) and not (folder / INFO).exists():
        raise UserError(
            f"checkpoint {str(checkpoint)!r} has no {INFO}, which tells the stage, the base and "
            "the arithmetic: it is not of Duet's training"
        )
    try:
        told = json.loads((folder / INFO).read_text())
    except (OSError, ValueError) as error:
        raise damaged(checkpoint, error) from error
    lacks = "the fingerprint of its base: use it with the version that wrote it"
    refuse_older(checkpoint, folder, told, "stage", "base", lacks)
    return read_provenance(AdapterInfo, folder / INFO, checkpoint)


def peft_config(
    rank: int, alpha: float, targets: Sequence[str], dropout: float = 0.0
) -> PeftConfig:
    return PeftConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=dropout)


def _check_config(told: dict[str, Any], info: AdapterInfo) -> None:
    """PEFT's config is the one that training makes of the LoRA settings."""
    lora = info.lora
    made = peft_config(lora.rank, lora.alpha, lora.target_modules).to_dict()
    wanted = json.loads(json.dumps(made, default=sorted))
    told = told | {"target_modules": sorted(told["target_modules"])}
    wanted["target_modules"] = sorted(wanted["target_modules"])
    for name, value in told.items():
        # of another version of PEFT may be what this one lacks, but not what is switched on
        if name not in _FREE and (value != wanted[name] if name in wanted else bool(value)):
            raise Damaged(f"its config has {name} = {value!r}, {INFO} {wanted.get(name)!r}")


def _check_weights(weights: dict[str, Tensor], info: AdapterInfo) -> None:
    """Pairs of finite float32 matrices of the rank, on layers that the targets name."""
    lora, layers = info.lora, set()
    for name, value in weights.items():
        match = _KEY.fullmatch(name)
        if match is None or not any(is_target(match[1], t) for t in lora.target_modules):
            raise Damaged(f"{name} is no weight of its targets")
        if value.dtype != torch.float32:
            raise Damaged(f"{name} is {value.dtype}, not float32")
        rank = value.shape[0 if match[2] == "A" else -1] if value.ndim == 2 else None
        if rank != lora.rank:
            raise Damaged(f"{name} of shape {list(value.shape)} is not of rank {lora.rank}")
        if not value.isfinite().all():
            raise Damaged(f"{name} has values that are not finite")
        layers.add(match[1])
    for layer in layers:
        for half in "AB":
            if f"{layer}.lora_{half}.weight" not in weights:
                raise Damaged(f"{layer}.lora_{half}.weight is missing")
    for target in lora.target_modules:
        if not any(is_target(layer, target) for layer in layers):
            raise Damaged(f"no weights for its target {target!r}")
