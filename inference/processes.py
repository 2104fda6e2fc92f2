"""The processes that a launcher started, where each holds a whole model and does its share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate import PartialState

from duet.configs.errors import UserError
from duet.inference.model import pick_device

_SHARDS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
_NOT = ("false", "0", "no")
# one process may wait for another's part of the pictures, which is no fault; one that dies is
# the launcher's to see
_LONGEST_WAIT = timedelta(hours=6)


@contextmanager
def sharing(device: str = "auto", mixed_precision: str = "no") -> Iterator[PartialState]:
    """The processes, each with its own device; alone where no launcher is.

    `device`: as `model.device` has it.
    Raises UserError where what accelerate was configured for is not what will run.
    """
    for kind in _SHARDS:
        name = f"ACCELERATE_USE_{kind}"
        value = os.environ.get(name, "false")
        if value.lower() not in _NOT:
            raise UserError(
                f"{name} = {value!r} in the environment asks for a model in shards, but only "
                "training divides one: launch this by launch/accelerate/ddp.yaml"
            )
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", mixed_precision):
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION = {mixed!r} in the environment, but what is run takes "
            f"{mixed_precision!r}: unset it (accelerate launch --mixed_precision no)"
        )
    on_cpu = pick_device(device).type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=_LONGEST_WAIT)
    yield state
    state.destroy_process_group()  # not after a failure, which others may not have heard of
