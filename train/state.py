"""accelerate's state of a run: optimizers, schedules and random states; never weights."""

from hashlib import sha256
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import load, set_seed

from duet.configs.errors import UserError, first_line

_FOLDER = "state"  # of a checkpoint


def leave_weights_out(accelerator: Accelerator) -> None:
    """`save_state` must not write, nor `load_state` read, the frozen base."""
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def save_state(accelerator: Accelerator, checkpoint: Path) -> None:
    """Every process calls it: each has its own random state."""
    accelerator.save_state(str(checkpoint / _FOLDER))


def load_state(accelerator: Accelerator, checkpoint: Path) -> None:
    """Raises UserError for a damaged checkpoint."""
    state = checkpoint / _FOLDER
    rank, first = accelerator.process_index, state / "random_states_0.pkl"
    own = state / f"random_states_{rank}.pkl"
    try:
        # load_state passes over random states that it cannot read
        load(own if own.exists() else first)
        accelerator.load_state(str(state))
        if not own.exists():  # more processes than wrote it: states like no other's
            drawn = sha256(first.read_bytes() + str(rank).encode()).digest()
            set_seed(int.from_bytes(drawn[:4]))
    except Exception as error:  # torch, pickle and zip readers each raise their own kinds
        raise UserError(
            f"checkpoint {str(checkpoint)!r} is damaged ({first_line(error)}): resume from another"
        ) from error
