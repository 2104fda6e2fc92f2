"""The GRPO objective: pure tensor functions, one for both stages.

An action is a visual token (AR) or a denoising step (decoder): [B, T] log-probs.
"""

from dataclasses import dataclass

import torch
from duet.configs.schema import GrpoConfig
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    loss: Tensor  # scalar
    ratio: Tensor  # [B, T], detached
    clipped_low: Tensor  # bool [B, T]: held at 1 - epsilon, where the advantage is negative
    clipped_high: Tensor  # bool [B, T]: held at 1 + epsilon_high, where it is positive


def importance_ratio(logprobs: Tensor, old: Tensor, level: str) -> Tensor:
    """pi / pi_old, [B, T]; `sequence`: GSPO's exp(mean_t log ratio) (arXiv 2507.18071)."""
    log_ratio = logprobs - old
    if level == "sequence":
        log_ratio = log_ratio.mean(-1, keepdim=True).expand_as(log_ratio)
    return log_ratio.exp()


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, config: GrpoConfig, kl: Tensor | None = None
) -> PolicyLoss:
    """-min(r A, clip(r, 1 - eps, 1 + eps_high) A) + beta kl for log-probs [B, T], advantages [B].

    grpo: mean over a sample's actions, then over samples. dr_grpo: sum over
    actions over a constant, then mean over samples, so that no action weighs less
    for standing in a longer sequence.
    """
    ratio = importance_ratio(logprobs, old, config.importance_sampling_level)
    low = 1 - config.epsilon
    high = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    gain = advantages[:, None]
    per_action = -torch.minimum(ratio * gain, ratio.clamp(low, high) * gain)
    if config.beta > 0:
        assert kl is not None
        per_action = per_action + config.beta * kl
    per_sample = per_action.mean(-1)
    if config.loss_type == "dr_grpo":
        per_sample = per_action.sum(-1) / DR_GRPO_LENGTH
    detached = ratio.detach()
    return PolicyLoss(
        per_sample.mean(), detached, (detached < low) & (gain < 0), (detached > high) & (gain > 0)
    )


DR_GRPO_LENGTH = 1000.0  # any constant: it only scales the learning rate


def k3_kl(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || ref) an action: e^d - d - 1, d = ref - pi; [B, T]."""
    difference = reference - logprobs
    return difference.exp() - difference - 1
