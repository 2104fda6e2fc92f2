"""Metrics to accelerate's trackers and always to a JSONL file; pictures now and then."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from duet.inference.rollout import Rollout
from duet.train.metrics import METRICS_FILE, read_metrics
from duet.train.run import Training


class MetricsLog:
    """The main process writes; the others' calls do nothing."""

    def __init__(self, training: Training) -> None:
        """Raises UserError for damaged metrics of the steps before."""
        accelerator, start = training.accelerator, training.start
        self.accelerator, self.folder = accelerator, Path(training.config.output_dir)
        self.images_every = training.config.train.logging_images_steps
        self.path = self.folder / METRICS_FILE
        self.alone = len(training.runs) == 1
        self.history: list[dict] = []  # of the steps before, in a resumed run
        if accelerator.is_main_process:
            if start.checkpoint:
                # what came after the checkpoint is done again
                steps = read_metrics(start.checkpoint.parent)
                self.history = [s for s in steps if s["step"] <= start.step]
            partial = self.path.with_name(f".{METRICS_FILE}.partial")
            partial.write_text("".join(json.dumps(s) + "\n" for s in self.history))
            partial.replace(self.path)

    def history_of(self, part: str) -> list[dict]:
        """The part's steps among those before."""
        return [step for step in self.history if step["stage"] == part]

    def write(
        self, part: str, metrics: dict[str, float], rollouts: Sequence[Rollout], step: int
    ) -> None:
        """After step `step`, counted from 1; in the pictures' grid each row is a group.

        Of a run in turns the trackers get `ar/reward` and `decoder/reward`, a chart each.
        """
        if not self.accelerator.is_main_process:
            return
        self._append({"step": step, "stage": part}, metrics)
        told = metrics if self.alone else {f"{part}/{k}": v for k, v in metrics.items()}
        self.accelerator.log(told, step=step)
        if (step - 1) % self.images_every == 0:
            grid = image_grid([i for r in rollouts for i in r.images], len(rollouts[0]))
            self._write_images(grid, step)

    def write_evaluation(self, id: str, metrics: dict[str, float], step: int) -> None:
        """Of the held-out prompts after step `step`, a line of its own; `id`: what it may be
        compared with."""
        if self.accelerator.is_main_process:
            self._append({"step": step, "stage": "eval", "evaluation": id}, metrics)
            self.accelerator.log(metrics, step=step)

    def has_evaluation(self, id: str, step: int) -> bool:
        """Whether the steps before have it; the main process knows."""
        return any(s["step"] == step and s.get("evaluation") == id for s in self.history)

    def has_other_evaluations(self, id: str) -> bool:
        return any(s.get("evaluation", id) != id for s in self.history)

    def _append(self, line: dict, metrics: dict[str, float]) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(line | finite) + "\n")

    def _write_images(self, grid: Image.Image, step: int) -> None:
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
