"""What training wrote of a part, an adapter or full weights: told apart and put onto a model."""

from pathlib import Path

from diffusers import GlmImagePipeline

from duet.configs.errors import UserError
from duet.inference import weights
from duet.inference.adapter_files import adapter_folder, check_adapter
from duet.inference.adapters import load_adapter
from duet.inference.provenance import Provenance

AVERAGE = "average"  # beside the trained ones, of the same layout


def trained_folder(checkpoint: str | Path) -> Path:
    """Where they lie: in the checkpoint's `adapter` or `weights`, or the folder itself."""
    return (weights.weights_folder if _is_full(checkpoint) else adapter_folder)(checkpoint)


def check_trained(checkpoint: str | Path, model_path: str) -> Provenance:
    """What can be wrong, told before the model's weights are read.

    Raises UserError as `load_trained`.
    """
    check = weights.check_weights if _is_full(checkpoint) else check_adapter
    return check(checkpoint, model_path)


def load_trained(pipeline: GlmImagePipeline, checkpoint: str | Path) -> Provenance:
    """Put a checkpoint's adapter or weights onto its part, frozen.

    Raises UserError for a folder that holds neither, a damaged one, or one of another base.
    """
    load = weights.load_weights if _is_full(checkpoint) else load_adapter
    return load(pipeline, checkpoint)


def averaged(checkpoint: str | Path) -> str:
    """The folder of its averaged weights, a checkpoint in itself. Raises UserError without one."""
    folder = Path(checkpoint) / AVERAGE
    if not folder.is_dir():
        raise UserError(
            f"checkpoint {str(checkpoint)!r} holds no average: it was trained without `average`"
        )
    return str(folder)


def _is_full(checkpoint: str | Path) -> bool:
    folder = Path(checkpoint)
    return (folder / "weights").is_dir() or (folder / weights.INFO).exists()
