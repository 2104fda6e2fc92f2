"""What ends a run before its last step, with a checkpoint."""

from pathlib import Path

from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from duet.configs.errors import UserError
from duet.train.checkpoint import save_checkpoint
from duet.train.collect import Collected
from duet.train.setup import Run
from duet.train.watch import Watch


def save(run: Run, done: int) -> Path:
    """The checkpoint after `done` rollouts, written unless it is there already."""
    return save_checkpoint(run.policy, run.config, run.start.run_id, run.start.inputs, done)


def require_scores(run: Run, collected: Collected, step: int) -> None:
    """End the run when a trained reward leaves out too many samples."""
    allowed = run.config.train.max_not_scored
    trained = collected.all_scores.trained.items()
    for (name, column), weight in zip(trained, run.weights, strict=True):
        if weight == 0:
            continue  # nothing is trained on it
        share = float(column.isnan().float().mean())
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
