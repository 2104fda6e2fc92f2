"""How many checkpoints a run keeps."""

import shutil
from collections.abc import Collection
from pathlib import Path

from duet.train.checkpoint import complete_checkpoints


def remove_old(output_dir: Path, limit: int | None, kept: Collection[Path] = ()) -> None:
    """Keep the newest `limit` whole checkpoints, and those that are to be `kept` anyway.

    One process calls it, once a new checkpoint is whole. A folder loses its name before its
    files, so that one of that name is always whole.
    """
    for left in output_dir.glob(".checkpoint-*.removed"):  # a run died on the way
        shutil.rmtree(left)
    if limit is None:
        return
    stay = {path.resolve() for path in kept}
    for old in complete_checkpoints(output_dir)[:-limit]:
        if old.resolve() not in stay:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")))
