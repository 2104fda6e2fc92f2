"""What an evaluation's scores say: means over prompts, with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from duet.configs.schema import EvalConfig

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its interval; None where nothing was scored."""

    mean: float | None
    interval: Interval | None
    change: float | None  # to the base, paired by prompt; None: of the base itself
    change_interval: Interval | None


@dataclass(frozen=True)
class Summary(Estimate):
    """One reward of one model."""

    perfect: Estimate  # the share of a prompt's scored pictures that score exactly 1


def summarise(scores: list, base: list | None, config: EvalConfig) -> Summary:
    """Of [prompts, images] scores, NaN or None where there is none; `base`: to compare with."""
    tables = [np.array(s, dtype=float) for s in (scores, base) if s is not None]
    exact = [np.where(np.isnan(table), np.nan, table == 1) for table in tables]
    return Summary(**vars(_estimate(tables, config)), perfect=_estimate(exact, config))


def _estimate(tables: Sequence[np.ndarray], config: EvalConfig) -> Estimate:
    """Of [prompts, images] scores, and against the base's where there are two tables."""
    values, *base = map(_prompt_means, tables)
    change = values - base[0] if base else np.array([])
    return Estimate(
        _mean(values),
        bootstrap_interval(values, config),
        _mean(change),
        bootstrap_interval(change, config),
    )


def mean_over_prompts(scores: Sequence) -> float | None:
    """The mean that `summarise` tells of [prompts, images] scores."""
    return _mean(_prompt_means(np.array(scores, dtype=float)))


def _prompt_means(table: np.ndarray) -> np.ndarray:
    """[prompts, images] -> [prompts], over the pictures that were scored; NaN where none was."""
    known = ~np.isnan(table)
    total = np.where(known, table, 0.0).sum(-1)
    return np.where(known.any(-1), total / np.maximum(known.sum(-1), 1), np.nan)


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def bootstrap_interval(values: Sequence[float], config: EvalConfig) -> Interval | None:
    """Percentile bootstrap of the mean over prompts (Efron), NaN left out."""
    known = np.array([v for v in values if not np.isnan(v)])
    if not len(known):
        return None
    rng = np.random.default_rng(0)
    picks = rng.integers(len(known), size=(config.bootstrap_samples, len(known)))
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(known[picks].mean(-1), [tail, 1 - tail])
    return float(low), float(high)
