"""Scoring beside sampling: while the next groups are sampled, the last are scored."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from duet.inference.rollout import Rollout
from duet.rewards.base import Reward, RewardInput, score
from duet.train.prompts import Group
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class Sampled:
    """A step's rollouts of this process with their scores."""

    rollouts: list[Rollout]
    scores: Tensor  # float32 [B, R], NaN where not scored
    rollout_seconds: float  # sampling
    reward_seconds: float  # scoring, beside sampling or after it
    wait_seconds: float  # scoring that sampling did not hide


def sample_and_score(
    sample: Callable[[Sequence[Group]], list[Rollout]],
    groups: Sequence[Group],
    rewards: Mapping[str, Reward],
    batch_size: int,
    show: bool = False,
) -> Sampled:
    """Sample whole groups, about `batch_size` samples at once, and score on a second thread.

    One thread scores in the order of sampling, so the scores are those of the
    sequential order. Raises UserError when a reward's answer is none.
    """
    rollouts, jobs, start = [], [], time.perf_counter()
    pool = ThreadPoolExecutor(1, thread_name_prefix="rewards")
    try:
        for batch in group_batches(groups, batch_size):
            made = sample(batch)
            rollouts += made
            jobs.append(pool.submit(_score, rewards, batch, made))
        sampled = time.perf_counter()
        bar = tqdm(jobs, desc="scoring", leave=False, disable=not show)
        parts = [job.result() for job in bar]
    finally:
        pool.shutdown(cancel_futures=True)
    return Sampled(
        rollouts,
        torch.cat([scores for scores, _ in parts]),
        sampled - start,
        sum(seconds for _, seconds in parts),
        time.perf_counter() - sampled,
    )


def group_batches(groups: Sequence[Group], batch_size: int) -> list[list[Group]]:
    """Consecutive whole groups, at most `batch_size` samples unless one group has more."""
    batches: list[list[Group]] = []
    for group in groups:
        held = sum(len(g.seeds) for g in batches[-1]) if batches else batch_size
        if held + len(group.seeds) > batch_size:
            batches.append([])
        batches[-1].append(group)
    return batches


def _score(
    rewards: Mapping[str, Reward], groups: Sequence[Group], rollouts: Sequence[Rollout]
) -> tuple[Tensor, float]:
    """Every reward on every sample, float32 [B, R], and the seconds it took."""
    start = time.perf_counter()
    inputs = [
        RewardInput(image, group.row["prompt"], group.row)
        for group, rollout in zip(groups, rollouts, strict=True)
        for image in rollout.images
    ]
    sizes = [len(r.images) for r in rollouts]
    columns = [score(reward, name, inputs, sizes) for name, reward in rewards.items()]
    return torch.tensor(columns).T, time.perf_counter() - start
