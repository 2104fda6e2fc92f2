"""Which checkpoint is the best: an evaluation every `train.eval_steps` rollouts."""

import math
import time

import torch
from accelerate.utils import gather_object

from duet.configs.schema import RunConfig
from duet.inference.together import from_main, gather_rows, together
from duet.rewards.answers import Answer
from duet.train.best import Best
from duet.train.endings import Endings
from duet.train.held_out import evaluation_metrics
from duet.train.journal import Journal
from duet.train.log import MetricsLog
from duet.train.measurement import held_out_requests
from duet.train.randomness import unmoved
from duet.train.run import Run, Training


class Selection:
    """Beside the loop; its methods are called by every process."""

    def __init__(
        self, training: Training, log: MetricsLog, journal: Journal, endings: Endings
    ) -> None:
        self.training, self.log, self.journal, self.endings = training, log, journal, endings

    def resumed(self) -> None:
        """Before the first step: what the run died in is done again, what it did is not."""
        start, id = self.training.start, self.training.held_out.id
        if self.training.config.train.eval_steps and self.log.has_other_evaluations(id):
            told = "the evaluations so far were of other prompts, pictures or rewards"
            self.journal.tell(f"{told}: the best checkpoint is sought among those to come")
        if start.checkpoint is None or not _due(self.training.config, start.step):
            return
        accelerator = self.training.accelerator
        if not from_main(accelerator, lambda: self.log.has_evaluation(id, start.step)):
            self._evaluate(start.step)

    def after(self, step: int) -> None:
        """After step `step`, counted from 1, whose metrics are written."""
        if _due(self.training.config, step):
            self._evaluate(step)

    def tell(self) -> None:
        """At the run's end."""
        if best := self.best.held:
            self.journal.tell(
                f"best by {self.best.metric.key}: {best.checkpoint}, {best.value:.3f}"
            )

    @property
    def best(self) -> Best:
        return self.endings.best

    def _evaluate(self, step: int) -> None:
        accelerator, held_out = self.training.accelerator, self.training.held_out
        metrics = measure(self.training)
        self.log.write_evaluation(held_out.id, metrics, step)
        won = from_main(accelerator, lambda: self.best.beaten_by(metrics))
        key = self.best.metric.key
        figure = "not scored" if math.isnan(metrics[key]) else f"{metrics[key]:.3f}"
        self.journal.tell(f"step {step}: {key} {figure}{', the best so far' if won else ''}")
        if won:
            checkpoint = self.endings.save()
            from_main(accelerator, lambda: self.best.take(metrics, step, checkpoint))
            self.endings.remove_old()  # the one that was the best before


def _due(config: RunConfig, step: int) -> bool:
    every = config.train.eval_steps
    return every is not None and step % every == 0


def measure(training: Training) -> dict[str, float]:
    """The held-out prompts by the policy as it stands, with the pictures of `duet evaluate`: each
    process draws a share of them, and all get the figures of the whole set.

    The run's random states stay where they are. Raises UserError, on all processes, when a
    reward fails on one, and Stopped on a signal.
    """
    start, accelerator = time.perf_counter(), training.accelerator
    run = next(iter(training.runs.values()))  # the parts share one pipeline
    with run.sampling(), together(accelerator), training.signals.heeded(), unmoved():
        own = _scores(training, run)
    shares = gather_object([own])
    scores = {place: told for share in shares for place, told in share.items()}
    by_reward = {name: [scores[n][name] for n in sorted(scores)] for name in scores[0]}
    metrics = evaluation_metrics(training.config, by_reward)
    took = torch.tensor([time.perf_counter() - start])
    return metrics | {"eval/seconds": float(gather_rows(accelerator, took).max())}


def _scores(training: Training, run: Run) -> dict[int, dict[str, list[Answer]]]:
    """By reward, of the prompts that are this process's, by their places."""
    held_out, accelerator = training.held_out, training.accelerator
    requests = held_out_requests(training.config, held_out.rows)
    rank, of = accelerator.process_index, accelerator.num_processes
    scores: dict[int, dict[str, list[Answer]]] = {}
    for part in run.stage.engine.in_parts(requests, rank, of):
        scores |= held_out.judges(held_out.rows, part)
    return scores
