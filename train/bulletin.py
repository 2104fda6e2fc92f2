"""What a user wants to know of a run: what trains, when it will end, what came of it."""

import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from duet.train.journal import Journal
from duet.train.run_folder import CONFIG_FILE
from duet.train.setup import Run


class Bulletin:
    """Tells the journal at the start, after each step and at the end."""

    def __init__(self, run: Run, journal: Journal) -> None:
        self.run, self.journal = run, journal
        self.start = self.step_start = time.monotonic()
        journal.tell(_what_trains(run))

    def step(self, metrics: Mapping[str, float], done: int) -> None:
        """After `done` steps in all."""
        now, last = time.monotonic(), self.run.config.train.max_steps
        seconds, self.step_start = now - self.step_start, now
        line = f"step {done}/{last}: reward {metrics['reward']:.3f}, {seconds:.1f} s"
        if metrics["updates/skipped"]:
            line += f", {metrics['updates/skipped']:.0f} updates skipped (not finite)"
        self.journal.tell_step(line)
        if done == self.run.start.step + 1 and done < last:
            left = timedelta(seconds=seconds * (last - done))
            end = (datetime.now() + left).isoformat(" ", "minutes")
            self.journal.tell(f"a step takes {seconds:.1f} s: {last - done} more end about {end}")

    def end(self, steps: Sequence[Mapping[str, float]], newest: Path | None) -> None:
        """`steps`: the metrics of the whole run, before a resume too."""
        window = self.run.config.watch.window
        rewards = [s["reward"] for s in steps if s.get("reward") is not None]
        if len(rewards) > 1:
            width = min(window, len(rewards) // 2)
            first, last = np.mean(rewards[:width]), np.mean(rewards[-width:])
            took = timedelta(seconds=round(time.monotonic() - self.start))
            self.journal.tell(
                f"reward {first:.3f} -> {last:.3f} (means of the first and last {width} of "
                f"{len(rewards)} steps), {took} (h:mm:ss)"
            )
        config = Path(self.run.config.output_dir) / CONFIG_FILE
        self.journal.tell(f"next: duet evaluate {config} --checkpoint {newest}")


_OWNED = re.compile(r"\.(lora_.*|[^.]+)$")  # a parameter's name below its layer's


def _what_trains(run: Run) -> str:
    config, policy = run.config, run.policy
    named = [n for n, p in policy.inner.named_parameters() if p.requires_grad]
    trained = sum(p.numel() for p in policy.trained)
    total = sum(p.numel() for p in policy.inner.parameters())
    layers = len({_OWNED.sub("", name) for name in named})
    how = f"{config.tuning} tuning"
    if config.average is not None:
        how += f", averaged with decay {config.average.decay:g}"
    dtype = str(next(policy.inner.parameters()).dtype).removeprefix("torch.")
    start = run.start.checkpoint or "fresh weights"
    return (
        f"{run.stage.part.component} of {config.model.path}: {trained:,} of {total:,} parameters "
        f"train, in {layers} layers; {run.accelerator.device}, {dtype}, mixed precision "
        f"{config.train.mixed_precision}, {run.accelerator.num_processes} process(es); {how}; "
        f"step {run.start.step + 1} to {config.train.max_steps} from {start}"
    )
