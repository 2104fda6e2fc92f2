"""What a user wants to know of a run: what trains, when it will end, what came of it."""

import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from duet.train.journal import Journal
from duet.train.run import Run, Training
from duet.train.run_folder import CONFIG_FILE


class Bulletin:
    """Tells the journal at the start, after each step and at the end."""

    def __init__(self, training: Training, journal: Journal) -> None:
        self.training, self.journal = training, journal
        self.start = self.step_start = time.monotonic()
        for run in training.runs.values():
            journal.tell(_what_trains(run))
        steps = f"step {training.start.step + 1} to {training.config.train.max_steps}"
        journal.tell(f"{steps} from {training.start.checkpoint or 'fresh weights'}")

    def step(self, part: str, metrics: Mapping[str, float], done: int) -> None:
        """After `done` steps in all."""
        now, last = time.monotonic(), self.training.config.train.max_steps
        seconds, self.step_start = now - self.step_start, now
        line = f"step {done}/{last}: {part} reward {metrics['reward']:.3f}, {seconds:.1f} s"
        if metrics["updates/skipped"]:
            line += f", {metrics['updates/skipped']:.0f} updates skipped (not finite)"
        self.journal.tell_step(line)
        if done == self.training.start.step + 1 and done < last:
            left = timedelta(seconds=seconds * (last - done))
            end = (datetime.now() + left).isoformat(" ", "minutes")
            self.journal.tell(f"a step takes {seconds:.1f} s: {last - done} more end about {end}")

    def end(self, steps: Mapping[str, Sequence[Mapping[str, float]]], newest: Path | None) -> None:
        """`steps`: by part, the metrics of the whole run, before a resume too."""
        for part, told in steps.items():
            rewards = [s["reward"] for s in told if s.get("reward") is not None]
            width = min(self.training.runs[part].config.watch.window, len(rewards) // 2)
            if width:
                first, last = np.mean(rewards[:width]), np.mean(rewards[-width:])
                self.journal.tell(
                    f"{part} reward {first:.3f} -> {last:.3f} (means of the first and last {width} "
                    f"of {len(rewards)} steps)"
                )
        took = timedelta(seconds=round(time.monotonic() - self.start))
        self.journal.tell(f"{took} (h:mm:ss)")
        config = Path(self.training.config.output_dir) / CONFIG_FILE
        self.journal.tell(f"next: duet evaluate {config} --checkpoint {newest}")


_OWNED = re.compile(r"\.(lora_.*|[^.]+)$")  # a parameter's name below its layer's


def _what_trains(run: Run) -> str:
    config, policy = run.config, run.policy
    named = [n for n, p in policy.inner.named_parameters() if p.requires_grad]
    trained = policy.size
    total = sum(policy.sharding.shape(p).numel() for p in policy.inner.parameters())
    layers = len({_OWNED.sub("", name) for name in named})
    how = f"{config.tuning} tuning"
    if config.average is not None:
        asked, last = config.average.decay, policy.average.decay(run.geometry.updates)
        how += f", averaged with decay {asked:g}"
        # a short run ends before the average is warm
        how += f" (at most {last:.2g} in this run)" if last < asked else ""
    dtype = str(next(policy.inner.parameters()).dtype).removeprefix("torch.")
    return (
        f"{run.stage.part.component} of {config.model.path}: {trained:,} of {total:,} parameters "
        f"train, in {layers} layers; {run.accelerator.device}, {dtype}, mixed precision "
        f"{config.train.mixed_precision}, {run.accelerator.num_processes} process(es); {how}"
    )
