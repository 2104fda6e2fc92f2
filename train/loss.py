"""The GRPO objective: pure tensor functions, one for both stages.

An action is a visual token (AR) or a denoising step (decoder): [B, T] log-probs. A sample with
fewer actions than T, as an edit beside a text prompt, has them last.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duet.configs.update_schema import GrpoConfig


@dataclass(frozen=True)
class Actions:
    """What a micro-batch of B samples did, and what came of it."""

    logprobs: Tensor  # [B, T], nats, by the weights that are trained
    old: Tensor  # [B, T], by those before the first update
    advantages: Tensor  # [B]
    kl: Tensor | None = None  # [B, T], to the reference
    weight: Tensor | None = None  # [B, T], truncated importance weight of `old` over the sampler
    taken: Tensor | None = None  # bool [B, T], False: the sample has none there; None: it has all

    @property
    def count(self) -> Tensor | int:
        """How many they are."""
        return self.logprobs.numel() if self.taken is None else self.taken.sum()

    def mean(self, values: Tensor) -> Tensor:
        """Over the actions, [B, T] -> scalar."""
        return masked_mean(values.float(), self.taken)


@dataclass(frozen=True)
class Counts:
    """What a loss is averaged over, also where a part of a sample's actions is given."""

    sample: int | Tensor  # the actions of each sample, or [B]
    batch: float  # of a micro-batch of this step, in the mean over all processes

    def of(self, index: list[int]) -> "Counts":
        """Of some of the samples [B]."""
        return replace(self, sample=self.sample[index])


@dataclass(frozen=True)
class PolicyLoss:
    loss: Tensor  # scalar
    metrics: dict[str, Tensor]  # scalars, detached; `/min` and `/max` name extremes


def masked_mean(values: Tensor, taken: Tensor | None, dim: int | None = None) -> Tensor:
    """Of the values that are `taken`, over all or over a dimension, which stays."""
    if taken is None:
        return values.mean() if dim is None else values.mean(dim, keepdim=True)
    values = values * taken
    if dim is None:
        return values.sum() / taken.sum()
    return values.sum(dim, keepdim=True) / taken.sum(dim, keepdim=True)


def importance_ratio(
    logprobs: Tensor, old: Tensor, level: str, taken: Tensor | None = None
) -> Tensor:
    """pi / pi_old, [B, T]; `sequence`: GSPO's exp(mean_t log ratio) (arXiv 2507.18071)."""
    log_ratio = logprobs - old
    if level == "sequence":
        log_ratio = masked_mean(log_ratio, taken, -1).expand_as(log_ratio)
    return log_ratio.exp()


def truncated_weight(old: Tensor, sampled: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_sampler, cap), [B, T]: TRL's and verl's rollout correction."""
    return (old - sampled).exp().clamp(max=cap)


def policy_loss(actions: Actions, config: GrpoConfig, counts: Counts) -> PolicyLoss:
    """-w min(r A, clip(r, 1 - eps, 1 + eps_high) A) + beta kl, normalised as `loss_type` says.

    The losses of parts of a sample's actions add up to the whole's.
    """
    taken = actions.taken
    ratio = importance_ratio(actions.logprobs, actions.old, config.importance_sampling_level, taken)
    low = 1 - config.epsilon
    high = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    gain = actions.advantages[:, None]
    per_action = -torch.minimum(ratio * gain, ratio.clamp(low, high) * gain)
    if actions.weight is not None:
        per_action = per_action * actions.weight
    if config.beta > 0:
        per_action = per_action + config.beta * actions.kl
    if taken is not None:
        per_action = per_action * taken
    loss = NORMALISED[config.loss_type](per_action, counts)
    detached = ratio.detach()
    clipped_low = (detached < low) & (gain < 0)
    clipped_high = (detached > high) & (gain > 0)
    none = torch.zeros_like(detached, dtype=torch.bool) if taken is None else ~taken
    metrics = {
        "ratio/mean": actions.mean(detached),
        "ratio/min": detached.masked_fill(none, torch.inf).min(),
        "ratio/max": detached.masked_fill(none, -torch.inf).max(),
        "clip_ratio/low_mean": actions.mean(clipped_low),
        "clip_ratio/high_mean": actions.mean(clipped_high),
        "clip_ratio/region_mean": actions.mean(clipped_low | clipped_high),
    }
    if actions.weight is not None:
        capped = actions.weight >= config.importance_sampling_cap
        metrics["sampling/importance_sampling_ratio/mean"] = actions.mean(actions.weight)
        metrics["sampling/importance_sampling_ratio/capped"] = actions.mean(capped)
    if actions.kl is not None:
        metrics["kl"] = actions.mean(actions.kl.detach())
    return PolicyLoss(loss, metrics)


DR_GRPO_LENGTH = 1000.0  # any constant: it only scales the learning rate


def _grpo(per_action: Tensor, counts: Counts) -> Tensor:
    """Mean over a sample's actions, then over samples."""
    return (per_action.sum(-1) / counts.sample).mean()


def _dr_grpo(per_action: Tensor, counts: Counts) -> Tensor:
    """Sum over actions over a constant, so that none weighs less in a longer sequence."""
    return per_action.sum(-1).mean() / DR_GRPO_LENGTH


def _dapo(per_action: Tensor, counts: Counts) -> Tensor:
    """Mean over all actions of the step: every token weighs the same (arXiv 2503.14476)."""
    return per_action.sum() / counts.batch


NORMALISED: dict[str, Callable[[Tensor, Counts], Tensor]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "dapo": _dapo,
}


def k3_kl(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || ref) an action: e^d - d - 1, d = ref - pi; [B, T]."""
    difference = reference - logprobs
    return difference.exp() - difference - 1
