"""A step's rollouts with their rewards: prompts in, samples and scores out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import gather_object
from torch import Tensor

from duet.inference.rollout import Rollout
from duet.inference.together import gather_rows, together
from duet.train.prior_tokens import Priors
from duet.train.prompts import Group, draw_groups, shard
from duet.train.run import Run
from duet.train.scoring import Sampled, Scores, answered, sample_and_score


@dataclass(frozen=True)
class Collected:
    """Of one step: what this process sampled, and how all processes' samples scored."""

    sampled: Sampled
    all_scores: Scores  # of all processes, one after another
    all_group_ids: Tensor
    place: slice  # of this process's samples among all

    def own(self, values: Tensor) -> Tensor:
        """This process's samples of one value a sample of all."""
        return values[self.place]

    @property
    def rollouts(self) -> list[Rollout]:
        return self.sampled.rollouts


def collect(run: Run, step: int) -> Collected:
    """Sample this process's share of the step's groups and score it.

    Raises UserError, on all processes, when a reward fails on one, and Stopped on a signal.
    """
    config, stage, accelerator = run.config, run.stage, run.accelerator
    count, samples = config.rollout.prompts_per_step, config.rollout.num_generations
    groups = draw_groups(run.rows, config.seed, step, count, samples)
    mine = shard(groups, accelerator.process_index, accelerator.num_processes)
    start = time.perf_counter()
    priors = _shared_priors(run, mine) if run.geometry.spread else None
    with run.sampling(), together(accelerator), run.signals.heeded():
        requests = stage.requests(mine, priors)  # else the decoder's are made or read here
        before = time.perf_counter() - start

        def sample(batch: Sequence[int]) -> list[Rollout]:
            return stage.engine.rollout([requests[i] for i in batch], stage.window(step))

        size = config.rollout.batch_size
        # scored beside sampling
        allowed = config.train.max_not_scored
        with run.scorer.resting.awake(), answered(run.scorer, run.weights, allowed):
            sampled = sample_and_score(sample, mine, run.scorer, size, run.shows)
        sampled = replace(sampled, rollout_seconds=before + sampled.rollout_seconds)
    ids = torch.tensor([g.id for g in mine for _ in g.seeds])
    scores = sampled.scores.map(lambda column: gather_rows(accelerator, column))
    first = accelerator.process_index * len(ids)
    place = slice(first, first + len(ids))
    return Collected(sampled, scores, gather_rows(accelerator, ids), place)


def _shared_priors(run: Run, mine: Sequence[Group]) -> list[Priors | None]:
    """Of each group here, from the one process that draws its first sample: made by each for
    itself, in other batches, they might differ by rounding within a group.
    """
    begun = [group for group in mine if group.first == 0]
    with run.sampling(), together(run.accelerator), run.signals.heeded():
        made = run.stage.priors(begun)
    told = [(group.id, prior) for group, prior in zip(begun, made, strict=True)]
    known = dict(gather_object(told))
    return [known[group.id] for group in mine]
