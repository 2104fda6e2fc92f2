"""Held-out prompts that a run evaluates while it trains, and the figures of their scores."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from duet.configs.best_metric import held_out_rewards
from duet.configs.row import Row
from duet.configs.schema import RunConfig
from duet.configs.turns import turns
from duet.rewards.answers import Answer
from duet.train.advantages import NOT_APPLICABLE
from duet.train.measurement import Judges
from duet.train.metrics import total_reward
from duet.train.row_digest import row_digest
from duet.train.statistics import mean_over_prompts


@dataclass(frozen=True)
class HeldOut:
    """The prompts with what measures them."""

    rows: Sequence[Row]
    judges: Judges | None  # None: nothing is evaluated
    id: str  # of evaluations whose figures may be compared


def evaluation_id(config: RunConfig, rows: Sequence[Row]) -> str:
    """Tells evaluations apart whose figures are not to be compared: by rows, pictures, rewards."""
    rewards = [asdict(reward) for reward in held_out_rewards(config)]
    told = [row_digest(rows), config.eval.images_per_prompt, rewards, _weights(config)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _weights(config: RunConfig) -> dict[str, float]:
    """Of the trained rewards, those of all turns added up."""
    weights: dict[str, float] = {}
    for part in turns(config).values():
        for reward in part.rewards:
            weights[reward.metric_name] = weights.get(reward.metric_name, 0.0) + reward.weight
    return weights


def evaluation_metrics(
    config: RunConfig, scores: Mapping[str, Sequence[Sequence[Answer]]]
) -> dict[str, float]:
    """`scores`: per reward [prompts, images]. Each reward's mean over prompts, as `duet evaluate`
    tells it, and `eval/reward`, that of the trained rewards' weighted sum.

    NaN where nothing was scored, and where more than `train.max_not_scored` was not: what is
    left is another set of pictures.
    """
    weights, metrics, missing = _weights(config), {}, []
    for name, table in scores.items():
        column = torch.tensor([_number(a) for answers in table for a in answers]).double()
        applies = column[column != NOT_APPLICABLE]
        share = float(applies.isnan().double().mean()) if len(applies) else 0.0
        too_many = share > config.train.max_not_scored
        missing += [name] if too_many and weights.get(name) else []
        mean = None if too_many else mean_over_prompts(table)
        metrics[f"eval/rewards/{name}/mean"] = math.nan if mean is None else mean
        metrics[f"eval/rewards/{name}/not_scored"] = share
    columns = torch.tensor([[[_number(a) for a in row] for row in scores[n]] for n in weights])
    prompts, images = columns.shape[1:]
    samples = columns.double().reshape(len(weights), -1).T  # [B, R]
    total = total_reward(samples, torch.tensor(list(weights.values())).double())
    mean = None if missing else mean_over_prompts(total.reshape(prompts, images).tolist())
    return {"eval/reward": math.nan if mean is None else mean, **metrics}


def _number(answer: Answer) -> float:
    return NOT_APPLICABLE if answer is None else answer
