"""Loading the parts of a GLM-Image checkpoint."""

import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import GlmImagePipeline
from diffusers.utils import logging as diffusers_logging
from torch.nn import Module
from transformers import GlmImageConfig
from transformers.utils import logging as transformers_logging

from duet.configs.environment import on_cpu_alone, require_gpus_allowed
from duet.configs.errors import UserError, first_line
from duet.configs.hub import is_hub_id
from duet.configs.launcher import is_first_here
from duet.inference.fingerprint import fingerprint

COMPONENTS = ("vision_language_encoder", "transformer", "vae", "text_encoder")  # with weights


def pick_device(name: str = "auto") -> torch.device:
    """`name`: as `model.device` has it, or a device of torch's.

    Raises UserError for a GPU where none is visible or accelerate's environment asks for the CPU.
    """
    if name == "auto":
        gpu = not on_cpu_alone(os.environ) and torch.cuda.is_available()
        return torch.device("cuda" if gpu else "cpu")
    if name.startswith("cuda"):
        require_gpus_allowed(os.environ, f"model.device = {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device = 'cuda', but no GPU is visible: use 'auto' or 'cpu'")
    device = torch.device(name)
    # several processes' "cpu:0" is no other place, but torch copies to it, and copied weights are
    # aligned otherwise in memory, which rounds otherwise
    return torch.device("cpu") if device.type == "cpu" else device


def model_folder(path: str) -> Path:
    """Where the model's files lie: the folder itself, or the cache of a hub id, fetched if need be.

    Raises UserError when there is no such model.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"model.path = {path!r} has no model_index.json: not a GLM-Image folder"
            )
        return folder
    if not is_hub_id(path):
        raise UserError(f"model.path = {path!r}: no such folder; give a GLM-Image folder or hub id")
    try:
        return _fetched(path)
    except OSError as error:
        raise UserError(
            f"model.path = {path!r}: no such folder, and as a hub id it cannot be loaded: "
            f"{first_line(error)}"
        ) from error


@cache
def _fetched(hub_id: str) -> Path:
    """Once a process: the hub is asked each time, for files that are there too."""
    _library_bars(sys.stderr.isatty())
    return Path(GlmImagePipeline.download(hub_id))


def base_fingerprint(path: str, component: str) -> str:
    """Of a model's component, by its weights. Raises UserError as `model_folder`."""
    return fingerprint(model_folder(path) / component)


@dataclass(frozen=True)
class Unread:
    """What stands for the AR where its weights are not needed."""

    config: GlmImageConfig


def load_pipeline(
    path: str,
    dtype: str = "float32",
    device: str = "auto",
    offload: str = "none",
    unread: Iterable[str] = (),
) -> GlmImagePipeline:
    """The seven parts of a local folder or a hub id, frozen, in eval mode.

    With `offload` phase on the CPU, where they wait for their phase. `unread` components
    are left out, with their weights; of the AR the config stays.

    Raises UserError when there is no such model.
    """
    folder, without = model_folder(path), dict.fromkeys(unread)
    _library_bars(sys.stderr.isatty())
    try:
        pipeline = GlmImagePipeline.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), **without
        )
        if "vision_language_encoder" in without:
            config = GlmImageConfig.from_pretrained(folder / "vision_language_encoder")
            pipeline.vision_language_encoder = Unread(config)
    except OSError as error:
        raise UserError(f"model.path = {path!r}: cannot be loaded: {first_line(error)}") from error
    _library_bars(False)  # later ones, as of writing an adapter, would break into Duet's own
    return freeze(pipeline).to(pick_device("cpu" if offload == "phase" else device))


def _says_something(record: logging.LogRecord) -> bool:
    """diffusers warns whenever an adapter is saved of modules to keep in float32, of which the
    DiT has none."""
    return "should be kept in float32: []" not in record.getMessage()


logging.getLogger("diffusers.models.modeling_utils").addFilter(_says_something)


def _library_bars(shown: bool) -> None:
    shown = shown and is_first_here()
    for library in (transformers_logging, diffusers_logging):
        (library.enable_progress_bar if shown else library.disable_progress_bar)()


def freeze(pipeline: GlmImagePipeline) -> GlmImagePipeline:
    """No part requires gradients; all are in eval mode."""
    for part in components(pipeline).values():
        part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def components(pipeline: GlmImagePipeline) -> dict[str, Module]:
    """Those with weights, without what was not read."""
    parts = {name: getattr(pipeline, name) for name in COMPONENTS}
    return {name: part for name, part in parts.items() if isinstance(part, Module)}
