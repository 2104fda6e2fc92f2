"""The two trained parts of a GLM-Image: a table of what tells them apart."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers import GlmImagePipeline
from diffusers.models.transformers.transformer_glm_image import GlmImageTransformerBlock
from torch.nn import Module
from transformers.models.glm_image.modeling_glm_image import GlmImageTextDecoderLayer

_DIT_WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Part:
    """A module that a stage trains, and how the stock library keeps its adapter."""

    name: str  # the stage's
    component: str  # the attribute of GlmImagePipeline
    block: type[Module]  # its repeated layer
    lora_targets: tuple[str, ...]  # names that occur in the trained layers only
    write_adapter: Callable[[Module, Path], None]
    read_adapter: Callable[[Module, Path], None]

    def module(self, pipeline: GlmImagePipeline) -> Module:
        return getattr(pipeline, self.component)


def _write_peft(module: Module, folder: Path) -> None:
    module.save_pretrained(folder)


def _read_peft(module: Module, folder: Path) -> None:
    module.load_adapter(str(folder))


def _write_diffusers(module: Module, folder: Path) -> None:
    module.save_lora_adapter(folder, weight_name=_DIT_WEIGHTS)


def _read_diffusers(module: Module, folder: Path) -> None:
    # the default prefix silently loads nothing
    module.load_lora_adapter(
        str(folder), prefix=None, weight_name=_DIT_WEIGHTS, adapter_name="default"
    )


AR = Part(
    "ar",
    "vision_language_encoder",
    GlmImageTextDecoderLayer,
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    _write_peft,
    _read_peft,
)
DECODER = Part(
    "decoder",
    "transformer",
    GlmImageTransformerBlock,
    ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    _write_diffusers,
    _read_diffusers,
)
PARTS = {part.name: part for part in (AR, DECODER)}
