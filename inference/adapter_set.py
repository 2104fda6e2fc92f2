"""What goes onto one model, adapters or full weights: whether they go together, told before the
model's weights are read.
"""

from collections.abc import Sequence
from pathlib import Path

from duet.configs.errors import UserError
from duet.inference.parts import PARTS
from duet.inference.provenance import Provenance
from duet.inference.trained import averaged, check_trained


def joined_adapters(
    option: str, checkpoints: Sequence[str], model_path: str, average: bool = False
) -> dict[str, Provenance]:
    """What stands beside each, by its folder; a checkpoint of a run in turns has two.

    With `average` the averages of all. Raises UserError for one that is damaged or of another
    base, for two of one stage, and for a checkpoint without an average that is asked for.
    """
    folders = [folder for checkpoint in checkpoints for folder in _folders(checkpoint)]
    folders = [averaged(folder) for folder in folders] if average else folders
    infos = {folder: check_trained(folder, model_path) for folder in folders}
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
