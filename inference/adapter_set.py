"""The adapters of one model: whether they go together, told before any weights are read."""

from collections.abc import Sequence
from pathlib import Path

from duet.configs.errors import UserError
from duet.inference.adapter_files import AdapterInfo, check_adapter
from duet.inference.parts import PARTS


def joined_adapters(
    option: str, checkpoints: Sequence[str], model_path: str
) -> dict[str, AdapterInfo]:
    """What stands beside each adapter, by its folder; a checkpoint of a run in turns has two.

    Raises UserError for one that is damaged or of another base, and for two of one stage.
    """
    folders = [folder for checkpoint in checkpoints for folder in _folders(checkpoint)]
    infos = {folder: check_adapter(folder, model_path) for folder in folders}
    stages = [infos[folder].stage for folder in folders]
    if len(set(stages)) < len(stages):
        raise UserError(
            f"{option} {','.join(checkpoints)} joins adapters of {' and '.join(stages)}: "
            "give one of each stage"
        )
    return infos


def _folders(checkpoint: str) -> list[str]:
    """Each part's in a checkpoint of both, else the checkpoint itself."""
    both = [str(Path(checkpoint) / part) for part in PARTS if (Path(checkpoint) / part).is_dir()]
    return both or [checkpoint]
