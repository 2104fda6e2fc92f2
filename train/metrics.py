"""Metrics under TRL's names: to accelerate's trackers and always to a JSONL file."""

import importlib.util
import json
import math
import netrc
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from duet.configs.errors import UserError
from duet.configs.schema import RunConfig
from duet.train.advantages import weighted
from PIL import Image

_WANDB_HOST = "api.wandb.ai"


def timed(work: Callable[[], dict]) -> tuple[dict, float]:
    """What the work returns, and its seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def prepare_trackers(config: RunConfig) -> list[str]:
    """Check that each tracker is installed; wandb without a login goes offline."""
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers has {name!r}, which is not installed: pip install 'duet[{name}]'"
            )
    if "wandb" in config.train.trackers and not _wandb_login():
        os.environ.setdefault("WANDB_MODE", "offline")
    return list(config.train.trackers)


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(_WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


METRICS_FILE = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict]:
    """The steps that a run has logged, [] before the first; a line cut short is none."""
    path = run / METRICS_FILE
    whole = path.read_text().rpartition("\n")[0] if path.is_file() else ""
    return [json.loads(line) for line in whole.splitlines()]


class MetricsLog:
    """The main process writes; the others' calls do nothing."""

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, resumed: Path | None, first_step: int
    ) -> None:
        """`resumed`: the checkpoint that the run goes on from, beside its run's metrics."""
        self.accelerator = accelerator
        self.folder = output_dir
        self.path = output_dir / METRICS_FILE
        self.history: list[dict] = []  # of the steps before, in a resumed run
        if accelerator.is_main_process:
            if resumed:
                # what came after the checkpoint is done again
                steps = read_metrics(resumed.parent)
                self.history = [s for s in steps if s["step"] <= first_step]
            partial = self.path.with_name(f".{METRICS_FILE}.partial")
            partial.write_text("".join(json.dumps(s) + "\n" for s in self.history))
            partial.replace(self.path)

    def write(self, metrics: dict[str, float], step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        self.accelerator.log(metrics, step=step)

    def write_images(self, images: Sequence[Image.Image], columns: int, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        grid = image_grid(images, columns)
        (self.folder / "images").mkdir(exist_ok=True)
        grid.save(self.folder / "images" / f"step-{step}.png")
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"rollout": np.asarray(grid)[None]}, step=step, **layout)


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size, row by row; a group a row when columns is its size."""
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


class Means:
    """Running means by name."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, values: torch.Tensor) -> None:
        self.values[name].append(float(values.float().mean()))

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over micro-batches and processes (every process adds equally many)."""
        means = torch.tensor([np.mean(v) for v in self.values.values()], device=accelerator.device)
        means = accelerator.reduce(means, "mean").tolist()
        return dict(zip(self.values, means, strict=True))


def reward_metrics(
    scores: torch.Tensor, weights: torch.Tensor, names: Sequence[str], group_ids: torch.Tensor
) -> dict[str, float]:
    """`reward` (weighted sum), `reward_std` (mean within groups) and each reward's mean and std.

    Scores [B, R] of all processes. A NaN is left out, with the sums it stands in, and
    counted as `rewards/<name>/not_scored`; what nothing is left of is NaN.
    """
    total = weighted(scores, weights).sum(-1)
    stds = torch.stack([_std(total[group_ids == g]) for g in group_ids.unique()])
    metrics = {"reward": float(total.nanmean()), "reward_std": float(stds.nanmean())}
    for i, name in enumerate(names):
        column = scores[:, i]
        metrics[f"rewards/{name}/mean"] = float(column.nanmean())
        metrics[f"rewards/{name}/std"] = float(_std(column))
        metrics[f"rewards/{name}/not_scored"] = float(column.isnan().float().mean())
    return metrics


def _std(values: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation of what was scored; NaN for fewer than two."""
    scored = values[~values.isnan()]
    return scored.std() if len(scored) > 1 else torch.tensor(math.nan)
