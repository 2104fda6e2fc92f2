"""A part without its weights, to be filled by what spreads it over processes: no process ever
holds all of it."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch.nn import Module
from transformers import GenerationConfig

from duet.inference.model import model_folder
from duet.inference.parts import Part
from duet.inference.shapes import builders


def build_empty(path: str, part: Part) -> Module:
    """Frozen, in float32, as its config says; parameters are on the meta device, buffers are made.

    Raises UserError when there is no such model.
    """
    folder = model_folder(path)
    with init_empty_weights(include_buffers=False):
        module = builders(folder)[part.component]()
    own = folder / part.component
    if (own / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(own)
    return module.requires_grad_(False).eval()


def weights_of(path: str, part: Part) -> Path:
    """The folder that holds what is missing."""
    return model_folder(path) / part.component


def make_room(module: Module, device: torch.device, recurse: bool = True) -> None:
    """For parameters that are on the meta device: new ones, of no value yet. Buffers keep what
    they hold. `recurse`: of submodules too.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers(recurse=recurse)}
    module.to_empty(device=device, recurse=recurse)
    for name, buffer in module.named_buffers(recurse=recurse):
        buffer.copy_(buffers[name])
