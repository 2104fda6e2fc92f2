"""How a rollout divides over processes, micro-batches and updates."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from duet.configs.errors import UserError
from duet.configs.schema import RunConfig


@dataclass(frozen=True)
class Geometry:
    samples: int  # of one rollout, on one process
    samples_per_update: int  # on one process
    passes: int  # over a rollout
    rollouts: int  # of the whole run
    spread: bool = False  # whether samples of one group are drawn by several processes

    @property
    def updates_per_rollout(self) -> int:
        return self.passes * self.samples // self.samples_per_update

    @property
    def updates(self) -> int:
        """Of the whole run."""
        return self.rollouts * self.updates_per_rollout


def geometry(config: RunConfig, processes: int, rollouts: int) -> Geometry:
    """`rollouts`: of the whole run, by this config. Raises UserError for what does not divide."""
    groups, size = config.rollout.prompts_per_step, config.rollout.num_generations
    samples, left = divmod(groups * size, processes)
    if left:
        raise UserError(
            f"rollout.prompts_per_step = {groups} groups of rollout.num_generations = {size} do "
            f"not divide over {processes} processes: give a multiple of "
            f"{_multiple(size, processes)} prompts"
        )
    optim = config.optim
    share = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
    if samples % share:
        raise UserError(
            f"{samples} samples a process do not divide into updates of "
            f"per_device_train_batch_size * gradient_accumulation_steps = {share}: "
            f"give a divisor of {samples}"
        )
    spread = groups % processes > 0
    return Geometry(samples, share, config.grpo.num_iterations, rollouts, spread)


def _multiple(size: int, processes: int) -> int:
    """Of how many groups of that size the samples divide."""
    return processes // gcd(size, processes)


def sizes_on_first(config: RunConfig, processes: int) -> list[int]:
    """How many samples of each of its groups the first process draws."""
    size = config.rollout.num_generations
    whole, rest = divmod(config.rollout.prompts_per_step * size // processes, size)
    return [size] * whole + [rest] * (rest > 0)


def nearest_geometry(config: RunConfig, processes: int) -> dict[str, int]:
    """The settings to change so that it divides, as little as may be: none where it does.

    A micro-batch only shrinks: memory is reckoned for it.
    """
    rollout, optim = config.rollout, config.optim
    multiple = _multiple(rollout.num_generations, processes)
    groups = max(1, round(rollout.prompts_per_step / multiple)) * multiple
    samples = groups * rollout.num_generations // processes
    share = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
    share = min(_divisors(samples), key=lambda d: (abs(d - share), d))
    fitting = [d for d in _divisors(share) if d <= optim.per_device_train_batch_size]
    found = {
        "rollout.prompts_per_step": groups,
        "optim.per_device_train_batch_size": max(fitting),
        "optim.gradient_accumulation_steps": share // max(fitting),
    }
    return {name: value for name, value in found.items() if value != setting_of(config, name)}


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def setting_of(config: RunConfig, name: str) -> Any:
    """By its dotted name."""
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def changed(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """With other values by their dotted names."""
    for name, value in settings.items():
        section, dot, key = name.partition(".")
        own = replace(getattr(config, section), **{key: value}) if dot else value
        config = replace(config, **{section: own})
    return config
