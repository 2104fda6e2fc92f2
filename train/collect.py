"""A step's rollouts with their rewards: prompts in, samples and scores out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duet.inference.rollout import Rollout
from duet.inference.together import gather_rows, together
from duet.train.prompts import draw_groups, shard
from duet.train.run import Run
from duet.train.scoring import Sampled, Scores, sample_and_score


@dataclass(frozen=True)
class Collected:
    """Of one step: what this process sampled, and how all processes' samples scored."""

    sampled: Sampled
    group_ids: Tensor  # int64 [B]
    all_scores: Scores  # of all processes
    all_group_ids: Tensor

    def own(self, values: Tensor) -> Tensor:
        """This process's samples of one value a sample of all."""
        return values[torch.isin(self.all_group_ids, self.group_ids)]

    @property
    def rollouts(self) -> list[Rollout]:
        return self.sampled.rollouts


def collect(run: Run, step: int) -> Collected:
    """Sample this process's groups and score them.

    Raises UserError, on all processes, when a reward fails on one, and Stopped on a signal.
    """
    config, stage, accelerator = run.config, run.stage, run.accelerator
    count, samples = config.rollout.prompts_per_step, config.rollout.num_generations
    groups = draw_groups(run.rows, config.seed, step, count, samples)
    mine = shard(groups, accelerator.process_index, accelerator.num_processes)
    start = time.perf_counter()
    with run.sampling(), together(accelerator), run.signals.heeded():
        requests = stage.requests(mine)  # the decoder's priors are made or read here
        before = time.perf_counter() - start

        def sample(batch: Sequence[int]) -> list[Rollout]:
            return stage.engine.rollout([requests[i] for i in batch], stage.window(step))

        size = config.rollout.batch_size
        with run.scorer.resting.awake():  # scored beside sampling
            sampled = sample_and_score(sample, mine, run.scorer, size, run.shows)
        sampled = replace(sampled, rollout_seconds=before + sampled.rollout_seconds)
    ids = torch.tensor([g.id for g in mine for _ in g.seeds])
    scores = sampled.scores.map(lambda column: gather_rows(accelerator, column))
    return Collected(sampled, ids, scores, gather_rows(accelerator, ids))
