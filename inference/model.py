"""Loading the parts of a GLM-Image checkpoint."""

from pathlib import Path

import torch
from diffusers import GlmImagePipeline

from duet.configs.errors import UserError, first_line
from duet.configs.hub import is_hub_id
from duet.inference.fingerprint import fingerprint

COMPONENTS = ("vision_language_encoder", "transformer", "vae", "text_encoder")  # with weights


def pick_device(name: str = "auto") -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device = 'cuda', but no GPU is visible: use 'auto' or 'cpu'")
    return torch.device(name)


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
        return Path(GlmImagePipeline.download(path))
    except OSError as error:
        raise UserError(
            f"model.path = {path!r}: no such folder, and as a hub id it cannot be loaded: "
            f"{first_line(error)}"
        ) from error


def base_fingerprint(path: str, component: str) -> str:
    """Of a model's component, by its weights. Raises UserError as `model_folder`."""
    return fingerprint(model_folder(path) / component)


def load_pipeline(
    path: str, dtype: str = "float32", device: str = "auto", offload: str = "none"
) -> GlmImagePipeline:
    """The seven parts of a local folder or a hub id, frozen, in eval mode.

    With `offload` phase on the CPU, where they wait for their phase.

    Raises UserError when there is no such model.
    """
    folder = model_folder(path)
    try:
        pipeline = GlmImagePipeline.from_pretrained(str(folder), dtype=getattr(torch, dtype))
    except OSError as error:
        raise UserError(f"model.path = {path!r}: cannot be loaded: {first_line(error)}") from error
    return freeze(pipeline).to(pick_device("cpu" if offload == "phase" else device))


def freeze(pipeline: GlmImagePipeline) -> GlmImagePipeline:
    """No part requires gradients; all are in eval mode."""
    for name in COMPONENTS:
        getattr(pipeline, name).requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
