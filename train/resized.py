"""A run that goes on with another number of processes than its checkpoint was trained with."""

from collections.abc import Mapping
from typing import Any

from duet.configs.errors import UserError

# these may change then, for what an update's samples are is theirs times the processes
SHARE = ("optim.per_device_train_batch_size", "optim.gradient_accumulation_steps")
_Tree = Mapping[str, Any]  # a config as JSON holds it


def what_changes(was: _Tree, processes_then: int, now: _Tree, processes: int) -> str:
    """In one line, what is not exact any more.

    Raises UserError where an update has another number of samples while the learning rate's
    schedule counts updates: it would go on from another place.
    """
    told = [f"goes on over {processes} processes, trained so far over {processes_then}"]
    told.append("sums over processes round in another order")
    if processes > processes_then:
        told.append("random states (dropout's, a reward's) of the new processes begin anew")
    elif processes < processes_then:
        told.append("random states (dropout's, a reward's) of the processes that are gone are lost")
    for part, optim in _optims(now).items():
        before, after = _update(_optims(was)[part], processes_then), _update(optim, processes)
        if before == after:
            continue
        warm = optim["warmup_steps"] or optim["warmup_ratio"]
        if warm or optim["lr_scheduler_type"] != "constant":
            _refuse(part, before, after, processes)
        told.append(f"an update of {part} has {after} samples instead of {before}")
    return f"{told[0]}: not to the bit what it was: {', '.join(told[1:])}"


def _optims(config: _Tree) -> dict[str, _Tree]:
    """By part."""
    own = {turn["part"]: turn["optim"] for turn in config["stages"]}
    return own or {config["stage"]: config["optim"]}


def _update(optim: _Tree, processes: int) -> int:
    """Samples of an update, over all processes."""
    share = optim["per_device_train_batch_size"] * optim["gradient_accumulation_steps"]
    return share * processes


def _refuse(part: str, before: int, after: int, processes: int) -> None:
    share, left = divmod(before, processes)
    way = f"give {' * '.join(SHARE)} = {share}"
    if left:
        way = f"launch a number of processes that divides {before}"
    raise UserError(
        f"an update of {part} has {after} samples over {processes} processes and had {before}, and "
        f"the learning rate's schedule counts updates: {way}"
    )
