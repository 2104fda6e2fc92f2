"""The adapters of one model: whether they go together, told before any weights are read."""

from collections.abc import Sequence

from duet.configs.errors import UserError
from duet.inference.adapter_files import AdapterInfo, check_adapter


def joined_adapters(option: str, checkpoints: Sequence[str], model_path: str) -> list[AdapterInfo]:
    """What stands beside each adapter.

    Raises UserError for one that is damaged or of another base, and for two of one stage.
    """
    infos = [check_adapter(checkpoint, model_path) for checkpoint in checkpoints]
    stages = [info.stage for info in infos]
    if len(set(stages)) < len(stages):
        raise UserError(
            f"{option} {','.join(checkpoints)} joins adapters of {' and '.join(stages)}: "
            "give one of each stage"
        )
    return infos
