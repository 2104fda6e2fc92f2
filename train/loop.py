"""GRPO on one module of GLM-Image: rollout, reward, advantage, update, checkpoint."""

from pathlib import Path

from tqdm import tqdm

from duet.configs.schema import RunConfig
from duet.train.advantages import group_advantages
from duet.train.bulletin import Bulletin
from duet.train.collect import collect
from duet.train.endings import Endings, heed_alarm, require_scores
from duet.train.journal import Journal
from duet.train.learn import learn
from duet.train.lock import alone
from duet.train.log import MetricsLog
from duet.train.run_folder import record_start
from duet.train.setup import Run, prepare
from duet.train.skipped import keep_samples, require_updates
from duet.train.step_metrics import step_metrics
from duet.train.watch import Watch


@alone
def train(config: RunConfig) -> Path:
    """Run the config to its last step; returns the newest checkpoint.

    Raises UserError for anything the user can mend, and for whatever ends the run before: the
    last finished step's checkpoint is left.
    """
    run = prepare(config)
    log, main = MetricsLog(run), run.accelerator.is_main_process
    if main:
        record_start(config, run.start.step)
    journal = Journal(Path(config.output_dir), main)
    try:
        with Endings(run, journal) as endings:
            return _steps(run, log, journal, endings)
    finally:
        journal.close()


def _steps(run: Run, log: MetricsLog, journal: Journal, endings: Endings) -> Path:
    config, bulletin = run.config, Bulletin(run, journal)
    watch, last = Watch(config.watch, log.history), config.train.max_steps
    steps = range(run.start.step, last)
    bar = tqdm(steps, "train", last, initial=run.start.step, disable=not run.shows)
    for step in bar:
        collected = collect(run, step)
        require_scores(run, collected)
        scores, ids = collected.all_scores.table, collected.all_group_ids
        advantages = group_advantages(scores, run.weights, ids, config.grpo)
        own = collected.own(advantages.values)
        with endings.updating():
            learned = learn(run, collected.rollouts, own, first=step == steps.start)
        keep_samples(run, collected, own, learned, step + 1)
        metrics = step_metrics(run, collected, advantages, learned)
        metrics |= watch(metrics)
        log.write(metrics, collected.rollouts, step + 1)
        bulletin.step(metrics, step + 1)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}")
        require_updates(run)
        if (step + 1) % config.train.save_steps == 0 or step + 1 == last:
            endings.save()
        heed_alarm(run, watch, journal, metrics)
    bulletin.end(watch.steps, endings.newest)
    return endings.newest
