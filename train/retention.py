"""How many checkpoints a run keeps."""

import shutil
from pathlib import Path

from duet.train.checkpoint import complete_checkpoints


def remove_old(output_dir: Path, limit: int | None, resumed: Path | None) -> None:
    """Keep the newest `limit` whole checkpoints, and the one that the run was `resumed` from.

    One process calls it, once a new checkpoint is whole. A folder loses its name before its
    files, so that one of that name is always whole.
    """
    for left in output_dir.glob(".checkpoint-*.removed"):  # a run died on the way
        shutil.rmtree(left)
    if limit is None:
        return
    kept = resumed and resumed.resolve()
    for old in complete_checkpoints(output_dir)[:-limit]:
        if old.resolve() != kept:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")))
