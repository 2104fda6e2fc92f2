"""What ends a run before its last step, with a checkpoint."""

from pathlib import Path

from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from duet.configs.errors import UserError
from duet.rewards.answers import LARGEST
from duet.train.advantages import NOT_APPLICABLE
from duet.train.checkpoint import save_checkpoint
from duet.train.collect import Collected
from duet.train.retention import remove_old
from duet.train.setup import Run
from duet.train.watch import Watch


def save(run: Run, done: int) -> Path:
    """The checkpoint after `done` rollouts, written unless it is there already."""
    start = run.start
    saved = save_checkpoint(run.policy, run.config, start.run_id, start.inputs, done)
    if run.accelerator.is_main_process:
        remove_old(saved.parent, run.config.train.save_total_limit, start.checkpoint)
    return saved


def require_scores(run: Run, collected: Collected, step: int) -> None:
    """End the run when a trained reward fails on too many of the samples to which it applies,
    or when a weighted score is too large for float32."""
    allowed = run.config.train.max_not_scored
    trained = collected.all_scores.trained.items()
    for (name, column), weight in zip(trained, run.weights, strict=True):
        if weight == 0:
            continue  # nothing is trained on it
        applies = column[column != NOT_APPLICABLE]
        if not (applies.isnan() | ((applies * weight).abs() <= LARGEST)).all():
            saved = save(run, step)
            raise UserError(
                f"reward {name!r}: its scores times its weight {float(weight):g} are "
                f"beyond {LARGEST:g}: give a smaller weight, then go on from {saved} "
                "with train.resume=latest"
            )
        share = float(applies.isnan().float().mean()) if len(applies) else 0.0
        if share > allowed:
            saved = save(run, step)
            raise UserError(
                f"reward {name!r} left {share:.0%} of a step's samples without a score "
                f"(train.max_not_scored allows {allowed:.0%}): mend it, then go on from "
                f"{saved} with train.resume=latest"
            )


def heed_alarm(run: Run, watch: Watch, metrics: dict[str, float], done: int) -> None:
    """Tell that the alarm rang; with `watch.stop`, end the run."""
    # one process decides for all: only its metrics file is sure to be whole
    rang = broadcast_object_list([metrics["watch/alarm"] > 0])[0]
    if not rang:
        return
    told = f"reward hacking? {watch.alarm_text(metrics)}"
    if run.config.watch.stop:
        saved = save(run, done)
        raise UserError(f"watch.stop ended the run at {saved}: {told}")
    if run.accelerator.is_main_process:
        tqdm.write(f"duet: alarm at step {done}: {told}")
