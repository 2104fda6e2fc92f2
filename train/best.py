"""The checkpoint that did best on held-out prompts: `best.json` names it, retention spares it."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet.configs.best_metric import best_metric
from duet.configs.schema import RunConfig
from duet.train.checkpoint import checkpoint_at, complete_checkpoints, sync

BEST_FILE = "best.json"


@dataclass(frozen=True)
class Candidate:
    """An evaluated checkpoint."""

    step: int  # rollouts that were done
    value: float  # finite
    checkpoint: Path


class Best:
    """One process keeps it, the one that writes metrics: they are all that it goes by, so what a
    killed run left undone is made good when it goes on.
    """

    def __init__(self, config: RunConfig, evaluation_id: str) -> None:
        self.metric, self.id = best_metric(config), evaluation_id
        self.folder = Path(config.output_dir)
        self.held: Candidate | None = None

    def recall(self, history: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Of the run so far, whose checkpoints lie in `folder`: of those that are still there."""
        there = set(complete_checkpoints(folder))
        for told in history:
            checkpoint = checkpoint_at(folder, told["step"])
            if told.get("evaluation") == self.id and self.beaten_by(told) and checkpoint in there:
                self.held = self._candidate(told, told["step"], checkpoint)
        self._write()

    def beaten_by(self, metrics: Mapping[str, Any]) -> bool:
        """A tie keeps the older one, and what is no number never wins."""
        value = metrics.get(self.metric.key)
        if value is None or not math.isfinite(value):
            return False
        if self.held is None:
            return True
        if self.metric.less_is_better:
            return value < self.held.value
        return value > self.held.value

    def take(self, metrics: Mapping[str, Any], step: int, checkpoint: Path) -> None:
        """Name the checkpoint, which is whole by now."""
        self.held = self._candidate(metrics, step, checkpoint)
        self._write()

    def _candidate(self, metrics: Mapping[str, Any], step: int, checkpoint: Path) -> Candidate:
        return Candidate(step, metrics[self.metric.key], checkpoint)

    def _write(self) -> None:
        """Whole or not at all; gone where nothing is best (any more)."""
        path = self.folder / BEST_FILE
        if self.held is None:
            path.unlink(missing_ok=True)
            return
        told = {
            "checkpoint": os.path.relpath(self.held.checkpoint, self.folder),
            "step": self.held.step,
            "metric": self.metric.key,
            "value": self.held.value,
        }
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")
        sync(partial)
        partial.replace(path)
        sync(path.parent)
