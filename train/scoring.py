"""Scoring beside sampling: while the next groups are sampled, the last are scored."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from duet.configs.best_metric import held_out_rewards
from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig, RunConfig
from duet.inference.batching import pack
from duet.inference.rollout import Rollout
from duet.rewards.answers import Answer
from duet.rewards.base import Reward, RewardInput, score
from duet.rewards.registry import load_rewards
from duet.rewards.resting import Resting
from duet.train.advantages import NOT_APPLICABLE
from duet.train.measurement import Judges
from duet.train.prompts import Group


@dataclass(frozen=True)
class Scores:
    """Rewards of B samples by name, each float32 [B]: NaN not scored, NOT_APPLICABLE."""

    trained: Mapping[str, Tensor]
    watched: Mapping[str, Tensor]  # measured and never trained on

    @property
    def table(self) -> Tensor:
        """The trained ones, [B, R]."""
        return torch.stack(list(self.trained.values()), 1)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Scores":
        """The same change to every column."""
        changed = ({n: change(v) for n, v in c.items()} for c in (self.trained, self.watched))
        return Scores(*changed)


@dataclass(frozen=True)
class Scorer:
    """The rewards of a run."""

    trained: Mapping[str, Reward]
    watched: Mapping[str, Reward]
    resting: Resting = Resting()

    def __call__(self, groups: Sequence[Group], rollouts: Sequence[Rollout]) -> Scores:
        """Every reward on every sample. Raises UserError when a reward's answer is none."""
        inputs = [
            RewardInput(image, group.row["prompt"], group.row)
            for group, rollout in zip(groups, rollouts, strict=True)
            for image in rollout.images
        ]
        sizes = [len(r.images) for r in rollouts]

        def columns(rewards: Mapping[str, Reward]) -> dict[str, Tensor]:
            return {n: _column(score(r, n, inputs, sizes)) for n, r in rewards.items()}

        return Scores(columns(self.trained), columns(self.watched))


@contextmanager
def answered(scorer: Scorer, weights: Tensor, allowed: float) -> Iterator[None]:
    """Around a step's scoring; `allowed`: as `train.max_not_scored` has it.

    Raises UserError where no server of a trained reward answered this process: of several
    processes its share may be one that is allowed.
    """
    asked = [
        (name, reward)
        for (name, reward), weight in zip(scorer.trained.items(), weights, strict=True)
        if weight and allowed < 1 and hasattr(reward, "silence")
    ]
    for _, reward in asked:
        reward.silence()  # of an evaluation before
    yield
    for name, reward in asked:
        if told := reward.silence():
            raise UserError(f"reward {name!r} had no good answer in a whole step ({told}): mend it")


@dataclass(frozen=True)
class Loaded:
    """All rewards of a run: what two of its parts ask for alike is there once."""

    scorers: Mapping[str, Scorer]  # by part
    judges: Judges | None  # of held-out pictures; None: the run evaluates none


def load_scorers(config: RunConfig, parts: Mapping[str, RunConfig]) -> Loaded:
    """Rewards with their weights; `parts`: the config as each turn has it.

    Raises UserError, with a reward's name.
    """
    known: list[tuple[RewardConfig, Reward]] = []

    def find(asked: RewardConfig) -> Reward:
        alike = replace(asked, weight=1.0)  # the weight is the advantages'
        for config, reward in known:
            if config == alike:
                return reward
        known.append((alike, load_rewards([asked])[asked.metric_name]))
        return known[-1][1]

    def named(asked: Sequence[RewardConfig]) -> dict[str, Reward]:
        return {reward.metric_name: find(reward) for reward in asked}

    offload, scorers, judges = config.model.offload, {}, None
    for part, own in parts.items():
        trained, watched = named(own.rewards), named(own.watch.rewards)
        resting = Resting([*trained.items(), *watched.items()], offload)
        scorers[part] = Scorer(trained, watched, resting)
    if config.train.eval_steps is not None:
        rewards = named(held_out_rewards(config))
        judges = Judges(rewards, Resting(rewards.items(), offload))
    # now that all know where their rewards are at home
    for each in filter(None, (*scorers.values(), judges)):
        each.resting.rest()
    return Loaded(scorers, judges)


def require_whole_groups(scorer: Scorer, config: RunConfig, processes: int) -> None:
    """For samples of a group on several processes. Raises UserError for a reward that compares
    those of a whole one."""
    for name, reward in (*scorer.trained.items(), *scorer.watched.items()):
        if getattr(reward, "whole_groups", False):
            raise UserError(
                f"reward {name!r} scores whole groups, and rollout.prompts_per_step = "
                f"{config.rollout.prompts_per_step} over {processes} processes draws samples of "
                f"one group on several: give a multiple of {processes}, or leave the reward out"
            )


def _column(answers: Sequence[Answer]) -> Tensor:
    return torch.tensor([NOT_APPLICABLE if a is None else a for a in answers], dtype=torch.float32)


@dataclass(frozen=True)
class Sampled:
    """A step's rollouts of this process with their scores."""

    rollouts: list[Rollout]
    scores: Scores
    rollout_seconds: float  # sampling
    reward_seconds: float  # scoring, beside sampling or after it
    wait_seconds: float  # scoring that sampling did not hide


def sample_and_score(
    sample: Callable[[Sequence[int]], list[Rollout]],
    groups: Sequence[Group],
    scorer: Callable[[Sequence[Group], Sequence[Rollout]], Scores],
    batch_size: int,
    show: bool = False,
) -> Sampled:
    """Sample whole groups, about `batch_size` samples at once, and score on a second thread.

    `sample` takes indices of groups. One thread scores in the order of sampling, so the
    scores are those of the sequential order. Raises UserError when a reward's answer is none.
    """
    batches = pack(groups, batch_size, weight=lambda group: len(group.seeds))
    rollouts, jobs, start = [], [], time.perf_counter()
    pool = ThreadPoolExecutor(1, "rewards", initializer=_on_the_same_gpu())
    try:
        for batch in batches:
            made = sample(batch)
            rollouts += made
            jobs.append(pool.submit(_timed, scorer, [groups[i] for i in batch], made))
        sampled = time.perf_counter()
        # closed before what it ends with is told
        with tqdm(jobs, desc="scoring", leave=False, disable=not show) as bar:
            parts = [job.result() for job in bar]
    finally:  # what ends a run does not wait for the reward that is being computed
        pool.shutdown(wait=False, cancel_futures=True)
    return Sampled(
        rollouts,
        _joined([part.scores for part in parts]),
        sampled - start,
        sum(part.seconds for part in parts),
        time.perf_counter() - sampled,
    )


def _on_the_same_gpu() -> Callable[[], None] | None:
    """For another thread's start: plain `cuda`, which a plug-in may name, is there what it is here.

    torch begins every thread on the first GPU, and a process's own may be another.
    """
    if not torch.cuda.is_initialized():  # asking for the device would take memory of a GPU
        return None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


@dataclass(frozen=True)
class _Part:
    scores: Scores
    seconds: float


def _timed(scorer, groups: Sequence[Group], rollouts: Sequence[Rollout]) -> _Part:
    start = time.perf_counter()
    scores = scorer(groups, rollouts)
    return _Part(scores, time.perf_counter() - start)


def _joined(parts: Sequence[Scores]) -> Scores:
    def column(kind: str, name: str) -> Tensor:
        return torch.cat([getattr(part, kind)[name] for part in parts])

    return replace(
        parts[0],
        trained={name: column("trained", name) for name in parts[0].trained},
        watched={name: column("watched", name) for name in parts[0].watched},
    )
