"""Whether a run's step fits into the memory of a device, and with which settings it would."""

from collections import ChainMap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from duet.configs.errors import UserError
from duet.configs.schema import RunConfig
from duet.inference.shapes import Sizes
from duet.train.environment import Engine
from duet.train.geometry import changed
from duet.train.kinds import Datasets
from duet.train.memory import GIB, Phase, peak, phases, step_of


@dataclass(frozen=True)
class Deployment:
    """Where a config is to run, and what it meets there."""

    sizes: Sizes  # of the model
    processes: int
    memory: int  # bytes of each process's device
    beside: Sequence[RunConfig] = ()  # as in `phases`
    engine: Engine = "ddp"
    datasets: Datasets = Datasets()

    def peak(self, config: RunConfig) -> Phase:
        step = step_of(config, self.sizes, self.processes, self.datasets)
        return peak(phases(config, step, self.processes, self.beside, self.engine))


def savings(config: RunConfig, there: Deployment) -> dict[str, Any] | None:
    """The settings that make it fit, the cheapest first; None: no setting does."""

    def fits(applied: Sequence[dict[str, Any]]) -> bool:
        now = changed(config, dict(ChainMap(*reversed(applied))))
        return there.peak(now).total <= there.memory

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


def require_fit(config: RunConfig, there: Deployment) -> None:
    """Raises UserError where a step needs more than the device has."""
    worst = there.peak(config)
    if worst.total <= there.memory:
        return
    largest, memory = max(worst.held, key=worst.held.get), there.memory / GIB
    raise UserError(
        f"the GPU has {memory:.1f} GiB and the phase {worst.name!r} needs "
        f"{worst.total / GIB:.1f} GiB, {worst.held[largest] / GIB:.1f} of them {largest}: "
        f"`duet plan CONFIG --gpus {there.processes} --engine {there.engine} --memory-gib "
        f"{memory:.0f}` tells which settings fit"
    )
