"""A run's optimizers, schedules and random states; never weights.

The files are accelerate's, as one process would write them, whatever spreads the run: another
number of processes and another engine can read them.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import load, save, set_seed
from accelerate.utils.constants import OPTIMIZER_NAME

from duet.configs.errors import UserError, first_line
from duet.inference.together import together
from duet.train.sharding import Sharding

_FOLDER = "state"  # of a checkpoint


def save_state(accelerator: Accelerator, shardings: Sequence[Sharding], checkpoint: Path) -> None:
    """Every process calls it: each has its own random state."""
    folder = checkpoint / _FOLDER
    with together(accelerator):
        folder.mkdir(exist_ok=True)
    for i, sharding in enumerate(shardings):
        state = sharding.state_dict()  # collective: none may wait in it for one whose disk is full
        with together(accelerator):
            save(state, folder / (f"{OPTIMIZER_NAME}_{i}.bin" if i else f"{OPTIMIZER_NAME}.bin"))
    with together(accelerator):
        save_accelerator_state(
            str(folder),
            [],
            [],
            [s.scheduler for s in shardings],
            [],
            accelerator.process_index,
            0,
            accelerator.scaler,
        )


def load_state(accelerator: Accelerator, shardings: Sequence[Sharding], checkpoint: Path) -> None:
    """Raises UserError for a damaged checkpoint."""
    state = checkpoint / _FOLDER
    rank, first = accelerator.process_index, state / "random_states_0.pkl"
    own = state / f"random_states_{rank}.pkl"
    try:
        # accelerate passes over random states that it cannot read
        load(own if own.exists() else first)
        load_accelerator_state(
            str(state),
            [],
            list(shardings),
            [s.scheduler for s in shardings],
            [],
            rank,
            accelerator.scaler,
            "cpu",
            load_kwargs={"mmap": True},  # each process takes its part alone
        )
        if not own.exists():  # more processes than wrote it: states like no other's
            drawn = sha256(first.read_bytes() + str(rank).encode()).digest()
            set_seed(int.from_bytes(drawn[:4]))
    except Exception as error:  # torch, pickle and zip readers each raise their own kinds
        raise UserError(
            f"checkpoint {str(checkpoint)!r} is damaged ({first_line(error)}): resume from another"
        ) from error
