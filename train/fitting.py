"""Whether a run's step fits into the memory of a device, and with which settings it would."""

from collections import ChainMap
from collections.abc import Iterator, Sequence
from typing import Any

from duet.configs.errors import UserError
from duet.configs.schema import RunConfig
from duet.inference.shapes import Sizes
from duet.train.environment import Engine
from duet.train.geometry import changed
from duet.train.memory import GIB, peak, phases, step_of


def savings(
    config: RunConfig,
    sizes: Sizes,
    processes: int,
    memory: int,
    beside: Sequence[RunConfig] = (),
    engine: Engine = "ddp",
) -> dict[str, Any] | None:
    """The settings that make it fit, the cheapest first; None: no setting does.

    `beside`, `engine`: as in `phases`.
    """

    def fits(applied: Sequence[dict[str, Any]]) -> bool:
        now = changed(config, dict(ChainMap(*reversed(applied))))
        step = step_of(now, sizes, processes)
        return peak(phases(now, step, processes, beside, engine)).total <= memory

    applied: list[dict[str, Any]] = []
    for saving in _savings(config):
        if fits(applied):
            break
        applied.append(saving)
    if not fits(applied):
        return None
    for saving in reversed(applied[:-1]):  # what it fits without, the dearest first
        fewer = [other for other in applied if other is not saving]
        applied = fewer if fits(fewer) else applied
    return {name: value for saving in applied for name, value in saving.items()}


def _savings(config: RunConfig) -> Iterator[dict[str, Any]]:
    optim, size = config.optim, config.rollout.batch_size
    share = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
    yield {"optim.gradient_checkpointing": True}
    if config.stage == "decoder" and config.grpo.importance_sampling_level == "token":
        yield {"optim.steps_per_backward": 1}
    yield {"optim.per_device_train_batch_size": 1, "optim.gradient_accumulation_steps": share}
    yield {"model.offload": "phase"}
    while size > 1:
        size //= 2
        yield {"rollout.batch_size": size}


def require_fit(
    config: RunConfig,
    sizes: Sizes,
    processes: int,
    memory: int,
    beside: Sequence[RunConfig] = (),
    engine: Engine = "ddp",
) -> None:
    """Raises UserError where a step needs more than the device's `memory` in bytes.

    `beside`, `engine`: as in `phases`.
    """
    worst = peak(phases(config, step_of(config, sizes, processes), processes, beside, engine))
    if worst.total <= memory:
        return
    largest = max(worst.held, key=worst.held.get)
    raise UserError(
        f"the GPU has {memory / GIB:.1f} GiB and the phase {worst.name!r} needs "
        f"{worst.total / GIB:.1f} GiB, {worst.held[largest] / GIB:.1f} of them {largest}: "
        f"`duet plan CONFIG --gpus {processes} --engine {engine} --memory-gib "
        f"{memory / GIB:.0f}` tells which settings fit"
    )
