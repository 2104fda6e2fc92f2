"""How a rollout divides over processes, micro-batches and updates."""

from dataclasses import dataclass

from duet.configs.errors import UserError
from duet.configs.schema import RunConfig


@dataclass(frozen=True)
class Geometry:
    samples: int  # of one rollout, on one process
    samples_per_update: int  # on one process
    passes: int  # over a rollout
    rollouts: int  # of the whole run

    @property
    def updates_per_rollout(self) -> int:
        return self.passes * self.samples // self.samples_per_update

    @property
    def updates(self) -> int:
        """Of the whole run."""
        return self.rollouts * self.updates_per_rollout


def geometry(config: RunConfig, processes: int, rollouts: int) -> Geometry:
    """`rollouts`: of the whole run, by this config. Raises UserError for what does not divide."""
    groups = config.rollout.prompts_per_step
    if groups % processes:
        raise UserError(
            f"rollout.prompts_per_step = {groups} does not divide over {processes} processes: "
            f"give a multiple of {processes}"
        )
    samples = groups // processes * config.rollout.num_generations
    optim = config.optim
    share = optim.per_device_train_batch_size * optim.gradient_accumulation_steps
    if samples % share:
        raise UserError(
            f"{samples} samples a process do not divide into updates of "
            f"per_device_train_batch_size * gradient_accumulation_steps = {share}: "
            f"give a divisor of {samples}"
        )
    return Geometry(samples, share, config.grpo.num_iterations, rollouts)
