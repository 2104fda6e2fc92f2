"""A part's full weights in a folder: written where stock `from_pretrained` reads them, checked,
and read back as they were trained.
"""

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import GlmImagePipeline
from safetensors import SafetensorError, safe_open
from torch.nn import Module

from duet.configs.digests import Damaged, check_digests, write_digests
from duet.configs.errors import UserError
from duet.inference.filling import Filling, Plain
from duet.inference.provenance import Provenance, damaged, read_provenance, require_base

INFO = "duet_weights.json"


def save_weights(module: Module, folder: Path, info: Provenance) -> None:
    """All of the part, idle submodules too: stock would draw at random what is not there."""
    module.save_pretrained(folder)
    (folder / INFO).write_text(json.dumps(asdict(info), indent=2))
    write_digests(folder)


def weights_folder(checkpoint: str | Path) -> Path:
    """Where the weights lie: in the checkpoint's `weights`, or the folder itself."""
    folder = Path(checkpoint)
    return folder / "weights" if (folder / "weights").is_dir() else folder


def weights_info(checkpoint: str | Path) -> Provenance:
    """Which part they are of, without reading them. Raises UserError as `check_weights`."""
    return read_provenance(Provenance, weights_folder(checkpoint) / INFO, checkpoint)


def check_weights(checkpoint: str | Path, model_path: str | None = None) -> Provenance:
    """Weights that are whole, finite and in float32; with `model_path`, of that base.

    Raises UserError for any other. Reads one tensor at a time.
    """
    info, folder = weights_info(checkpoint), weights_folder(checkpoint)
    if model_path is not None:
        require_base(info, checkpoint, model_path)
    try:
        with ExitStack() as files:
            for name, file in _tensors(folder, files).items():
                value = file.get_tensor(name)
                if value.dtype != torch.float32:
                    raise Damaged(f"{name} is {value.dtype}, not float32")
                if not value.isfinite().all():
                    raise Damaged(f"{name} has values that are not finite")
        check_digests(folder)
    except (OSError, UserError, SafetensorError) as error:
        raise damaged(checkpoint, error) from error
    return info


def load_weights(pipeline: GlmImagePipeline, checkpoint: str | Path) -> Provenance:
    """Put a checkpoint's weights in the place of its part's, frozen.

    Raises UserError for a folder that holds none, damaged ones, or those of another base.
    """
    info = check_weights(checkpoint, pipeline.config["_name_or_path"])
    module = info.part.module(pipeline)
    if getattr(module, "peft_config", None):
        raise UserError(f"weights {str(checkpoint)!r}: the {info.stage} has an adapter already")
    # the dtype that it is trained in: stock loads it in the one that it is told
    fill_weights(module.float(), checkpoint, Plain())
    module.requires_grad_(False).eval()
    return info


def restore_weights(module: Module, checkpoint: str | Path, into: Filling = Plain()) -> None:
    """Give the module the very values that were saved.

    Raises UserError as `load_weights`, but asks nothing of the base.
    """
    check_weights(checkpoint)
    fill_weights(module, checkpoint, into)


def fill_weights(module: Module, checkpoint: str | Path, into: Filling) -> None:
    """Of any folder with all of a module's weights, a model's own too; one tensor at a time.

    Raises UserError where the names or shapes are not the module's.
    """
    own = module.state_dict(keep_vars=True)
    with ExitStack() as files:
        saved = _tensors(weights_folder(checkpoint), files)
        for name in sorted(own.keys() ^ saved.keys()):
            raise damaged(checkpoint, KeyError(f"{name} stands on one side only"))
        for name, value in own.items():
            if list(into.shape(value)) != saved[name].get_slice(name).get_shape():
                raise damaged(checkpoint, ValueError(f"{name} has another shape"))
        for name, value in own.items():
            into.fill(value, saved[name].get_tensor(name))


def _tensors(folder: Path, files: ExitStack) -> dict[str, Any]:
    """The open file of each tensor, by the tensor's name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = files.enter_context(safe_open(path, "pt"))
        names = file.keys()
        for name in found.keys() & names:
            raise Damaged(f"{name} stands in two files")
        found |= dict.fromkeys(names, file)
    if not found:
        raise Damaged("no safetensors there")
    return found
