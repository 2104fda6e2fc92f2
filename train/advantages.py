"""Group-relative advantages: pure tensor functions.

A_i = (r_i - mean r) / std r over the samples of one prompt (GRPO, arXiv
2402.03300); without the division it is Dr. GRPO's (arXiv 2503.20783).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from duet.configs.update_schema import GrpoConfig

NOT_APPLICABLE = -math.inf  # in a table of scores: no reward may answer it
_EPSILON = 1e-4  # TRL's guard in the denominator
_NO_SPREAD = 1e-6  # a standard deviation below this is rounding


@dataclass(frozen=True)
class Advantages:
    values: Tensor  # float32 [B]
    frac_reward_zero_std: float  # share of groups in which no reward tells samples apart


def group_advantages(
    scores: Tensor, weights: Tensor, group_ids: Tensor, config: GrpoConfig = GrpoConfig()
) -> Advantages:
    """Scores [B, R], weights [R], integer group ids [B] -> advantages [B].

    B: the whole step's samples, of all processes. Scores that are none: NaN (not scored) and
    NOT_APPLICABLE.

    `normalize_then_sum`: each reward is normalised within its group, then weighted and
    summed (GDPO, arXiv 2601.05242); `sum_then_normalize` sums the weighted rewards before. A
    NaN leaves the sample out of that reward's statistics and adds nothing to its advantage;
    with the latter the sample is left out as a whole, its sum being unknown. What does not
    apply adds nothing, and the sample stays in. A group without spread gets 0.

    `scale_rewards: batch` divides by the standard deviation over the step: with
    `sum_then_normalize` that of the summed rewards, with `normalize_then_sum` that of the
    sums, GDPO's last step. TRL takes that step always. Here it is asked for: the sums have
    mean 0 already, so it is one factor for all samples, which Adam takes out again; but where
    few groups have spread it blows these up, against the KL and the clipped gradient.
    """
    scores = scores.float()
    if config.multi_objective_aggregation == "sum_then_normalize":
        scores = weighted(scores, weights).sum(-1, keepdim=True)  # NaN stays NaN
        weights = torch.ones(1)
    values, by_group = torch.zeros(len(scores)), config.scale_rewards == "group"
    if config.scale_rewards == "batch":
        by_group = config.multi_objective_aggregation == "normalize_then_sum"
    groups = group_ids.unique()
    flat_groups = 0
    for group in groups:
        members = group_ids == group
        normalised, spread = _normalise(scores[members], by_group)
        values[members] = (normalised * weights).sum(-1)
        flat_groups += not bool((spread & (weights != 0)).any())
    if config.scale_rewards == "batch":
        values = values / (_std(values if by_group else scores[:, 0]) + _EPSILON)
    return Advantages(values, flat_groups / len(groups))


def _std(values: Tensor) -> Tensor:
    """Unbiased, of what was scored; 0 for fewer than two."""
    scored = values[~values.isnan()]
    return scored.std() if len(scored) > 1 else torch.tensor(0.0)


def weighted(scores: Tensor, weights: Tensor) -> Tensor:
    """scores * weights, [B, R]; what weighs nothing or does not apply adds 0."""
    nothing = (weights == 0) | (scores == NOT_APPLICABLE)
    return torch.where(nothing, 0.0, scores * weights)


def _normalise(scores: Tensor, scale: bool) -> tuple[Tensor, Tensor]:
    """One group [G, R] -> normalised [G, R] with 0 for NaN, and which rewards have spread [R]."""
    scored = scores.isfinite()
    count = scored.sum(0)
    mean = scores.where(scored, 0.0).sum(0) / count.clamp(min=1)
    centred = torch.where(scored, scores - mean, 0.0)
    std = (centred.square().sum(0) / (count - 1).clamp(min=1)).sqrt()
    spread = std > _NO_SPREAD
    if scale:
        centred = centred / (std + _EPSILON)
    return torch.where(spread, centred, 0.0), spread
