"""From advantages to weights: whose log-probs the ratio starts from, the gate, the updates."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from duet.inference.rollout import Rollout
from duet.inference.together import together
from duet.train import gate
from duet.train.run import Run
from duet.train.update import rescore, update


@dataclass(frozen=True)
class Learned:
    metrics: dict[str, float]  # over all processes
    skipped: dict[int, Tensor]  # samples of this process in skipped updates: their log-probs [T]
    seconds: float  # on this process


def learn(run: Run, rollouts: Sequence[Rollout], advantages: Tensor, first: bool) -> Learned:
    """One rollout's updates; before the `first` one, what trains must be what sampled.

    Raises UserError, on all processes, where it is not, and when weights are no longer finite.
    """
    start = time.perf_counter()
    trainer = run.config.old_logprobs_of == "trainer"
    single = run.geometry.updates_per_rollout == 1 and run.config.dropout == 0
    needed = trainer and not single
    if first or needed:
        rescored = rescore(run, rollouts)
    if first:
        with together(run.accelerator):
            gate.check_gap(run.stage, rollouts, rescored, run.config.arithmetic.precision)
    updated = update(run, rollouts, advantages, rescored if needed else None)
    run.policy.require_finite()
    return Learned(updated.metrics, updated.skipped, time.perf_counter() - start)
