"""A run's optimizers, schedules and random states; never weights.

The files are named as accelerate's and filled as it would on one process, whatever spreads the run:
another number of processes and another engine can read them. accelerate's own reader is not called:
it passes over random states that it cannot read.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load, save, set_seed
from accelerate.utils.constants import (
    OPTIMIZER_NAME,
    RNG_STATE_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
)

from duet.configs.errors import UserError, first_line
from duet.inference.together import together
from duet.train.randomness import RandomState
from duet.train.sharding import Sharding

_FOLDER = "state"  # of a checkpoint


def save_state(accelerator: Accelerator, shardings: Sequence[Sharding], checkpoint: Path) -> None:
    """Every process calls it: each has its own random state."""
    folder = checkpoint / _FOLDER
    with together(accelerator):
        folder.mkdir(exist_ok=True)
    for i, sharding in enumerate(shardings):
        state = sharding.state_dict()  # collective: none may wait in it for one whose disk is full
        with together(accelerator):  # the main process writes what is of all
            save(state, folder / _name(OPTIMIZER_NAME, i))
            save(sharding.scheduler.state_dict(), folder / _name(SCHEDULER_NAME, i))
    with together(accelerator):
        if accelerator.scaler is not None:
            save(accelerator.scaler.state_dict(), folder / SCALER_NAME)
        torch.save(RandomState.now().as_saved(), folder / _random(accelerator.process_index))


def load_state(accelerator: Accelerator, shardings: Sequence[Sharding], checkpoint: Path) -> None:
    """Raises UserError for a damaged checkpoint."""
    folder, rank = checkpoint / _FOLDER, accelerator.process_index
    own, first = folder / _random(rank), folder / _random(0)
    try:
        saved = _read(own if own.exists() else first)
        states = RandomState.of_saved(saved, accelerator.local_process_index)
        for i, sharding in enumerate(shardings):
            # each process takes its part alone
            sharding.load_state_dict(_read(folder / _name(OPTIMIZER_NAME, i), mmap=True))
            sharding.scheduler.load_state_dict(_read(folder / _name(SCHEDULER_NAME, i)))
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(_read(folder / SCALER_NAME))
        if own.exists():
            states.restore()
        else:  # more processes than wrote it: states like no other's
            drawn = sha256(first.read_bytes() + str(rank).encode()).digest()
            set_seed(int.from_bytes(drawn[:4]))
    except Exception as error:  # torch, pickle and zip readers each raise their own kinds
        raise UserError(
            f"checkpoint {str(checkpoint)!r} is damaged ({first_line(error)}): resume from another"
        ) from error


def _read(file: Path, mmap: bool = False) -> dict[str, Any]:
    return load(file, map_location="cpu", mmap=mmap)


def _name(kind: str, part: int) -> str:
    return f"{kind}_{part}.bin" if part else f"{kind}.bin"


def _random(process: int) -> str:
    return f"{RNG_STATE_NAME}_{process}.pkl"
