"""A run's figures: what it has logged, how micro-batches add up, what rewards tell."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from duet.configs.errors import UserError
from duet.train.advantages import NOT_APPLICABLE, weighted

METRICS_FILE = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict]:
    """The steps that a run has logged, [] before the first; a last line cut short is none.

    Raises UserError for a line that is no step.
    """
    path = run / METRICS_FILE
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    return [_logged(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _logged(line: bytes, where: str) -> dict:
    try:
        step = json.loads(line)
        int(step["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{where} is no line of metrics ({line[:40]!r}): delete that line, then go on"
        ) from error
    return step


class Totals:
    """Metrics of micro-batches, added up on the device: one sync a step.

    A name that ends in `/min` or `/max` keeps the extreme, every other the mean.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, metrics: Mapping[str, torch.Tensor], weight: torch.Tensor | float = 1.0) -> None:
        """Scalars, on any device. `weight`: of the means, 1 in the mean over all that is added."""
        for name, value in metrics.items():
            kept = value.detach().float()
            self.values[name].append(kept if _kind(name) in _REDUCED else kept * weight)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Over micro-batches and processes (every process adds equally many)."""
        device = accelerator.device
        local = [
            _REDUCED.get(_kind(name), torch.mean)(torch.stack([v.to(device) for v in values]))
            for name, values in self.values.items()
        ]
        table = accelerator.gather(torch.stack(local)[None]).cpu()  # [processes, names]
        return {
            name: float(_REDUCED.get(_kind(name), torch.mean)(column))
            for name, column in zip(self.values, table.T, strict=True)
        }


_REDUCED = {"min": torch.min, "max": torch.max}


def _kind(name: str) -> str:
    return name.rpartition("/")[2]


def reward_metrics(
    scores: torch.Tensor, weights: torch.Tensor, names: Sequence[str], group_ids: torch.Tensor
) -> dict[str, float]:
    """`reward` (weighted sum), `reward_std` (mean within groups) and each reward's mean and std.

    Scores [B, R] of all processes. A NaN is left out, with the sums it stands in; where a reward
    does not apply, the sum is that of the others, and none where no other does. Shares of all
    samples: `rewards/<name>/not_scored` and `not_applicable`. What nothing is left of is NaN.
    """
    total = total_reward(scores, weights)
    stds = torch.stack([_std(total[group_ids == g]) for g in group_ids.unique()])
    metrics = {"reward": float(total.nanmean()), "reward_std": float(stds.nanmean())}
    for i, name in enumerate(names):
        column = scores[:, i]
        metrics[f"rewards/{name}/mean"] = score_mean(column)
        metrics[f"rewards/{name}/std"] = float(_std(column))
        metrics[f"rewards/{name}/not_scored"] = float(column.isnan().float().mean())
        without = (column == NOT_APPLICABLE).float().mean()
        metrics[f"rewards/{name}/not_applicable"] = float(without)
    return metrics


def total_reward(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each sample's scores [B, R]: NaN with a NaN, and where none applies."""
    asked = ((scores != NOT_APPLICABLE) & (weights != 0)).any(-1) | (weights == 0).all()
    return weighted(scores, weights).sum(-1).where(asked, math.nan)


def score_mean(column: torch.Tensor) -> float:
    """Of what was scored; NaN where nothing was."""
    return float(column[column.isfinite()].mean())


def _std(values: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation of what was scored; NaN for fewer than two."""
    scored = values[values.isfinite()]
    return scored.std() if len(scored) > 1 else torch.tensor(math.nan)
