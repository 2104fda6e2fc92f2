"""The two trained parts of a GLM-Image: a table of what tells them apart."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import GlmImagePipeline
from diffusers.models.transformers.transformer_glm_image import GlmImageTransformerBlock
from safetensors import safe_open
from torch.nn import Module
from transformers.models.glm_image.modeling_glm_image import GlmImageTextDecoderLayer

_AR_WEIGHTS, _AR_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_DIT_WEIGHTS, _DIT_CONFIG = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"


@dataclass(frozen=True)
class Part:
    """A module that a stage trains, and how the stock library keeps its adapter."""

    name: str  # the stage's
    component: str  # the attribute of GlmImagePipeline
    block: type[Module]  # its repeated layer
    lora_targets: tuple[str, ...]  # names that occur in the trained layers only
    idle: tuple[str, ...]  # submodules that a training forward does not pass
    write_adapter: Callable[[Module, Path], None]
    read_config: Callable[[Path], dict[str, Any]]  # PEFT's, as the adapter's folder tells it
    weights_file: str  # of an adapter
    prefix: str  # before a layer's name in that file

    def module(self, pipeline: GlmImagePipeline) -> Module:
        return getattr(pipeline, self.component)


def _write_peft(module: Module, folder: Path) -> None:
    module.save_pretrained(folder)


def _read_peft_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _AR_CONFIG).read_text())


def _write_diffusers(module: Module, folder: Path) -> None:
    module.save_lora_adapter(folder, weight_name=_DIT_WEIGHTS)


def _read_diffusers_config(folder: Path) -> dict[str, Any]:
    with safe_open(folder / _DIT_WEIGHTS, "pt") as file:
        return json.loads((file.metadata() or {})[_DIT_CONFIG])


AR = Part(
    "ar",
    "vision_language_encoder",
    GlmImageTextDecoderLayer,
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    ("model.visual", "model.vqmodel"),
    _write_peft,
    _read_peft_config,
    _AR_WEIGHTS,
    "base_model.model.",
)
DECODER = Part(
    "decoder",
    "transformer",
    GlmImageTransformerBlock,
    ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    (),
    _write_diffusers,
    _read_diffusers_config,
    _DIT_WEIGHTS,
    "",
)
PARTS = {part.name: part for part in (AR, DECODER)}
