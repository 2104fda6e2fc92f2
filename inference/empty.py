"""A part without its weights, to be filled by what spreads it over processes: no process ever
holds all of it."""

from contextlib import AbstractContextManager
from pathlib import Path

from torch.nn import Module
from transformers import GenerationConfig

from duet.inference.model import model_folder
from duet.inference.parts import Part
from duet.inference.shapes import builders


def build_empty(path: str, part: Part, container: AbstractContextManager[None]) -> Module:
    """Frozen, in float32, as its config says; `container` sees to it that parameters take no
    memory. Buffers are made.

    Raises UserError when there is no such model.
    """
    folder = model_folder(path)
    with container:
        module = builders(folder)[part.component]()
    own = folder / part.component
    if (own / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(own)
    return module.requires_grad_(False).eval()


def weights_of(path: str, part: Part) -> Path:
    """The folder that holds what is missing."""
    return model_folder(path) / part.component
