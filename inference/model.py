"""The parts of a GLM-Image checkpoint and the adapters on them."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import GlmImagePipeline
from duet.configs.errors import UserError
from duet.inference.attention import FLOAT64_SUMS
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

# AR names that occur in `language_model` only; DiT attention and feed-forward
TARGET_MODULES = {
    "ar": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "decoder": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
}
_COMPONENT = {"ar": "vision_language_encoder", "decoder": "transformer"}
_DIT_WEIGHTS = "pytorch_lora_weights.safetensors"
ADAPTER_INFO = "duet_adapter.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


def pick_device(name: str = "auto") -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device = 'cuda', but no GPU is visible: use 'auto' or 'cpu'")
    return torch.device(name)


def load_pipeline(path: str, dtype: str = "float32", device: str = "auto") -> GlmImagePipeline:
    """The seven parts of a local folder or a hub id, frozen, in eval mode.

    Raises UserError when there is no such model.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"model.path = {path!r} has no model_index.json: not a GLM-Image folder")
    if not folder.is_dir() and not _HUB_ID.fullmatch(path):
        raise UserError(f"model.path = {path!r}: no such folder; give a GLM-Image folder or hub id")
    try:
        pipeline = GlmImagePipeline.from_pretrained(path, dtype=getattr(torch, dtype))
    except OSError as error:
        found = "" if folder.is_dir() else "no such folder, and as a hub id it "
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.path = {path!r}: {found}cannot be loaded: {reason}") from error
    for name in ("vision_language_encoder", "transformer", "vae", "text_encoder"):
        getattr(pipeline, name).requires_grad_(False).eval()
    if dtype == "float32":
        pipeline.vision_language_encoder.set_attn_implementation({"text_config": FLOAT64_SUMS})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(pick_device(device))


def generation_defaults(pipeline: GlmImagePipeline) -> dict[str, float]:
    """Sampling settings that the checkpoint itself names; size in pixels.

    The size is the VAE's `sample_size` where that is a [height, width] pair, else the
    processor's. What is not named keeps the pipeline's 50 steps and guidance scale 1.5.
    """
    config = pipeline.vision_language_encoder.generation_config
    size = pipeline.vae.config.sample_size
    if not isinstance(size, list | tuple):
        size = pipeline.processor.target_h, pipeline.processor.target_w
    found = {
        "height": size[0],
        "width": size[1],
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
    }
    return {name: value for name, value in found.items() if value is not None}


def module_of(pipeline: GlmImagePipeline, stage: str) -> torch.nn.Module:
    """The trained module of a stage: the AR for `ar`, the DiT for `decoder`."""
    return getattr(pipeline, _COMPONENT[stage])


def add_adapter(
    module: torch.nn.Module, stage: str, rank: int, alpha: float, targets: tuple[str, ...] = ()
) -> None:
    """Put a fresh LoRA (B = 0: no change yet) on the module; only it requires gradients.

    Raises UserError when no module bears a target's name.
    """
    names = list(targets or TARGET_MODULES[stage])
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)
    try:
        module.add_adapter(config)
    except ValueError as error:
        raise UserError(f"lora.target_modules = {names} fits no layer: {error}") from error
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # AdamW needs float32 masters


def save_adapter(module: torch.nn.Module, stage: str, folder: Path, base: str) -> None:
    """Write the adapter where stock `load_adapter` (AR) or `load_lora_adapter` (DiT) reads it."""
    if stage == "ar":
        module.save_pretrained(folder)
    else:
        module.save_lora_adapter(folder, weight_name=_DIT_WEIGHTS)
    (folder / ADAPTER_INFO).write_text(json.dumps({"stage": stage, "base_model": base}))


def load_adapter(pipeline: GlmImagePipeline, checkpoint: str | Path) -> str:
    """Load a checkpoint's adapter onto its module; returns its stage.

    Raises UserError for a folder that holds no (or a damaged) adapter.
    """
    folder = adapter_folder(checkpoint)
    stage = adapter_stage(checkpoint)
    module = module_of(pipeline, stage)
    if getattr(module, "peft_config", None):
        raise UserError(f"adapter {str(checkpoint)!r}: the {stage} has an adapter already")
    try:
        if stage == "ar":
            module.load_adapter(str(folder))
        else:
            # the default prefix silently loads nothing
            module.load_lora_adapter(
                str(folder), prefix=None, weight_name=_DIT_WEIGHTS, adapter_name="default"
            )
    except Exception as error:  # safetensors and peft each raise their own kinds
        raise _damaged(checkpoint, error) from error
    module.requires_grad_(False).eval()
    return stage


def resume_adapter(pipeline: GlmImagePipeline, checkpoint: str | Path) -> None:
    """`load_adapter` to train on: float32, the very weights that were saved.

    The libraries' loaders round them to the dtype of the base.
    """
    module = module_of(pipeline, load_adapter(pipeline, checkpoint))
    file = next(adapter_folder(checkpoint).glob("*.safetensors"))
    saved = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): value
        for name, value in load_file(file).items()
    }
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = saved[name].to(parameter.device, torch.float32)
            parameter.requires_grad_(True)


def adapter_folder(checkpoint: str | Path) -> Path:
    """Where the adapter lies: in the checkpoint's `adapter`, or the folder itself."""
    folder = Path(checkpoint)
    return folder / "adapter" if (folder / "adapter").is_dir() else folder


def adapter_stage(checkpoint: str | Path) -> str:
    """The stage that trained it, without loading it. Raises UserError as `load_adapter`."""
    try:
        stage = json.loads((adapter_folder(checkpoint) / ADAPTER_INFO).read_text())["stage"]
        _COMPONENT[stage]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(checkpoint, error) from error
    return stage


def _damaged(checkpoint: str | Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"checkpoint {str(checkpoint)!r} is missing or damaged ({reason}): "
        "give a folder that training wrote"
    )


@contextmanager
def adapter_disabled(module: torch.nn.Module) -> Iterator[None]:
    """The reference policy: the same module with its LoRA switched off."""
    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
