"""Trained adapters and full weights under a run's config: those that `model.adapters` begins with,
and those of checkpoints that are measured by it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import GlmImagePipeline

from duet.configs.digests import SUMS
from duet.configs.errors import UserError
from duet.configs.schema import RunConfig
from duet.configs.turns import turns
from duet.inference.adapter_files import AdapterInfo
from duet.inference.adapter_set import joined_adapters
from duet.inference.provenance import Provenance
from duet.inference.trained import load_trained, trained_folder


@dataclass(frozen=True)
class Given:
    """What a part begins with."""

    folder: str
    digest: str  # over those of its files, wherever they lie


def given(config: RunConfig) -> dict[str, Given]:
    """What `model.adapters` gives, by the part's name.

    Raises UserError, before the model's weights are read, as `checked`, and where a part is
    trained whose settings are not those of what it is given.
    """
    found = checked("model.adapters", config.model.adapters, config)
    trained = turns(config)
    for folder, info in found.items():
        if info.stage in trained:
            _require_settings(info, folder, trained[info.stage])
    return {info.stage: Given(folder, _digest(folder)) for folder, info in found.items()}


def checked(
    option: str, checkpoints: Sequence[str], config: RunConfig, average: bool = False
) -> dict[str, Provenance]:
    """What stands beside each, by its folder.

    Raises UserError as `joined_adapters`, and for one of another arithmetic than the config's.
    """
    infos = joined_adapters(option, checkpoints, config.model.path, average)
    for checkpoint, info in infos.items():
        if info.arithmetic != config.arithmetic:
            trained, asked = info.arithmetic, config.arithmetic
            raise UserError(
                f"model.dtype = {asked.dtype!r} and train.mixed_precision = "
                f"{asked.mixed_precision!r}, but {checkpoint!r} was trained with "
                f"{trained.dtype!r} and {trained.mixed_precision!r}: give those, or it is "
                "another policy than the trained one"
            )
    return infos


def load_given(
    pipeline: GlmImagePipeline, begun: Mapping[str, Given], parts: Iterable[str]
) -> None:
    """What those of the parts begin with that are given something: frozen, as in evaluation."""
    for part in parts:
        if part in begun:
            load_trained(pipeline, begun[part].folder)


def _require_settings(info: Provenance, folder: str, config: RunConfig) -> None:
    for name, held, asked in _settings(info, config):
        if held != asked:
            raise UserError(
                f"{name} = {asked!r} of the {info.stage}, but {folder!r} of model.adapters, which "
                f"it begins with, has {held!r}: give that, or begin without it"
            )


def _settings(info: Provenance, config: RunConfig) -> list[tuple[str, Any, Any]]:
    """(setting, of what is given, of the config)"""
    if not isinstance(info, AdapterInfo):
        return [("tuning", "full", config.tuning)]
    held, asked = info.lora, config.lora
    targets = sorted(asked.target_modules or info.part.lora_targets)
    return [
        ("tuning", "lora", config.tuning),
        ("lora.rank", held.rank, asked.rank),
        ("lora.alpha", held.alpha, asked.alpha),
        ("lora.target_modules", sorted(held.target_modules), targets),
    ]


def _digest(folder: str) -> str:
    return hashlib.sha256((trained_folder(folder) / SUMS).read_bytes()).hexdigest()
