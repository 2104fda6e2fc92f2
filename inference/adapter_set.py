"""The adapters of one model: whether they go together, told before any weights are read."""

from collections.abc import Sequence

from duet.configs.errors import UserError
from duet.inference.adapters import AdapterInfo, adapter_info


def joined_adapters(option: str, checkpoints: Sequence[str]) -> list[AdapterInfo]:
    """What stands beside each adapter.

    Raises UserError for a folder that holds none, and for two of one stage.
    """
    infos = [adapter_info(checkpoint) for checkpoint in checkpoints]
    stages = [info.stage for info in infos]
    if len(set(stages)) < len(stages):
        raise UserError(
            f"{option} {','.join(checkpoints)} joins adapters of {' and '.join(stages)}: "
            "give one of each stage"
        )
    return infos
