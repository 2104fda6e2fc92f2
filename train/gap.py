"""How far what sampled is from what trains: log-probs of the same actions, twice."""

import math
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Gap:
    """The distribution of log pi_trainer - log pi_sampler over actions.

    Rounding leaves `mean_ratio` near 1 and `sharpness` near 0 however large it is; a support
    that is ignored moves the first, a temperature that is applied twice the second. Both
    are taken over the 99 % of the actions that agree best: in low precision a single token
    that the two see nats apart would outweigh all others.
    """

    actions: int  # how many
    mean_ratio: float  # of pi_trainer / pi_sampler
    sharpness: float  # how much wider the trainer's log-probs spread: (V_t - V_s) / (2 V_mean)
    mean: float  # of |log ratio|, nats
    p99: float
    p999: float
    max: float
    effective_sample_size: float  # (sum w)^2 / (n sum w^2), a share of the actions

    @classmethod
    def of(cls, trainer: Tensor, sampler: Tensor) -> "Gap":
        """Log-probs of any one shape. NaN or infinity anywhere makes every figure NaN."""
        ours, theirs = (x.detach().double().flatten().cpu().numpy() for x in (trainer, sampler))
        log_ratio = ours - theirs
        if not np.isfinite(log_ratio).all():
            return cls(len(log_ratio), *[float("nan")] * 7)
        ratio, size = np.exp(log_ratio), np.abs(log_ratio)
        p99, p999 = np.quantile(size, [0.99, 0.999])
        most = size <= p99
        spread = 2 * np.var((ours + theirs)[most] / 2)
        sharpness = (np.var(ours[most]) - np.var(theirs[most])) / spread if spread else 0.0
        share = ratio.sum() ** 2 / (len(ratio) * np.square(ratio).sum())
        figures = ratio[most].mean(), sharpness, size.mean(), p99, p999, size.max(), share
        return cls(len(log_ratio), *map(float, figures))

    def metrics(self) -> dict[str, float]:
        """Under TRL's names where it has them."""
        return {
            "sampling/sampling_logp_difference/mean": self.mean,
            "sampling/sampling_logp_difference/p999": self.p999,
            "sampling/sampling_logp_difference/max": self.max,
            "sampling/effective_sample_size": self.effective_sample_size,
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in asdict(self).items())


_MEASURED_ACTIONS = 2024  # of the groups that `ratio` and `sharpness` were measured on


@dataclass(frozen=True)
class Bounds:
    """What rounding can make of the gap of one group's actions."""

    mean: float  # nats
    p99: float
    ratio: float = 0.006  # of |mean_ratio - 1|
    sharpness: float = 0.005

    def broken(self, gap: Gap) -> list[str]:
        """The figures that are out of bounds, NaN among them."""
        few = max(1.0, math.sqrt(_MEASURED_ACTIONS / gap.actions))  # means of few are wider
        found = {
            "mean": (gap.mean, self.mean),
            "p99": (gap.p99, self.p99),
            "|mean_ratio - 1|": (abs(gap.mean_ratio - 1), self.ratio * few),
            "|sharpness|": (abs(gap.sharpness), self.sharpness * few),
        }
        return [
            f"{name} {value:.3g} (allowed {allowed:.3g})"
            for name, (value, allowed) in found.items()
            if not value <= allowed
        ]
