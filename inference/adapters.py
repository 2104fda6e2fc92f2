"""LoRA adapters: put on, written, read back as they were trained, and switched off."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusers import GlmImagePipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch.nn import Module

from duet.configs.errors import UserError
from duet.configs.schema import Arithmetic
from duet.inference.parts import PARTS, Part

_INFO = "duet_adapter.json"


@dataclass(frozen=True)
class AdapterInfo:
    """What stands beside an adapter's weights."""

    stage: str
    base_model: str
    arithmetic: Arithmetic  # that of the policy which training sampled with

    @property
    def part(self) -> Part:
        return PARTS[self.stage]


def add_adapter(
    module: Module,
    part: Part,
    rank: int,
    alpha: float,
    targets: Sequence[str] = (),
    dropout: float = 0.0,
) -> None:
    """Put a fresh LoRA (B = 0: no change yet) on the module; only it requires gradients.

    It is in eval mode as the module is: nothing drops before training says so.

    Raises UserError when no module bears a target's name.
    """
    names = list(targets or part.lora_targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=dropout)
    try:
        module.add_adapter(config)
    except ValueError as error:
        raise UserError(f"lora.target_modules = {names} fits no layer: {error}") from error
    module.eval()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # AdamW needs float32 masters


def save_adapter(module: Module, folder: Path, info: AdapterInfo) -> None:
    """Write the adapter where stock `load_adapter` (AR) or `load_lora_adapter` (DiT) reads it."""
    info.part.write_adapter(module, folder)
    (folder / _INFO).write_text(json.dumps(asdict(info)))


def load_adapter(pipeline: GlmImagePipeline, checkpoint: str | Path) -> AdapterInfo:
    """Put a checkpoint's adapter on its module, frozen.

    Raises UserError for a folder that holds no (or a damaged) adapter.
    """
    info = adapter_info(checkpoint)
    module = info.part.module(pipeline)
    if getattr(module, "peft_config", None):
        raise UserError(f"adapter {str(checkpoint)!r}: the {info.stage} has an adapter already")
    try:
        info.part.read_adapter(module, adapter_folder(checkpoint))
    except Exception as error:  # safetensors and peft each raise their own kinds
        raise _damaged(checkpoint, error) from error
    restore_adapter(module, checkpoint)
    module.requires_grad_(False).eval()
    return info


def restore_adapter(module: Module, checkpoint: str | Path) -> None:
    """Give the module's adapter the very values that were saved, in float32.

    The libraries' own loaders round them to the dtype of the base, which is another policy
    than the one that was trained.
    Raises UserError as `load_adapter`.
    """
    try:
        saved = load_file(next(adapter_folder(checkpoint).glob("*.safetensors")))
    except Exception as error:  # the same kinds
        raise _damaged(checkpoint, error) from error
    masters = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    own = {
        name.replace(".default.weight", ".weight"): parameter
        for name, parameter in module.named_parameters()
        if "lora_" in name
    }
    for name in own.keys() ^ masters.keys():
        raise _damaged(checkpoint, KeyError(f"{name} stands on one side only"))
    for name, parameter in own.items():
        if parameter.shape != masters[name].shape:
            raise _damaged(checkpoint, ValueError(f"{name} has another shape"))
        parameter.data = parameter.data.float()
        parameter.data.copy_(masters[name])


def adapter_folder(checkpoint: str | Path) -> Path:
    """Where the adapter lies: in the checkpoint's `adapter`, or the folder itself."""
    folder = Path(checkpoint)
    return folder / "adapter" if (folder / "adapter").is_dir() else folder


def adapter_info(checkpoint: str | Path) -> AdapterInfo:
    """Which part it is for, without loading it. Raises UserError as `load_adapter`."""
    try:
        told = json.loads((adapter_folder(checkpoint) / _INFO).read_text())
        info = AdapterInfo(**told | {"arithmetic": Arithmetic(**told["arithmetic"])})
        PARTS[info.stage]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(checkpoint, error) from error
    return info


def _damaged(checkpoint: str | Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"checkpoint {str(checkpoint)!r} is missing or damaged ({reason}): "
        "give a folder that training wrote"
    )


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
