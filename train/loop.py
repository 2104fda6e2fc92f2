"""GRPO on a module of GLM-Image, or on both in turns: rollout, reward, advantage, update,
checkpoint."""

from pathlib import Path

from tqdm import tqdm

from duet.configs.schema import RunConfig
from duet.inference.together import from_main
from duet.train.advantages import group_advantages
from duet.train.best import Best
from duet.train.bulletin import Bulletin
from duet.train.collect import collect
from duet.train.endings import Endings, heed_alarm, require_scores
from duet.train.journal import Journal
from duet.train.learn import learn
from duet.train.lock import alone
from duet.train.log import MetricsLog
from duet.train.run import Training
from duet.train.run_folder import record_start
from duet.train.selection import Selection
from duet.train.setup import prepare
from duet.train.skipped import keep_samples, require_updates
from duet.train.step_metrics import step_metrics
from duet.train.watch import Watch


@alone("output_dir")
def train(config: RunConfig) -> Path:
    """Run the config to its last step; returns the newest checkpoint.

    Raises UserError for anything the user can mend, and for whatever ends the run before: the
    last finished step's checkpoint is left.
    """
    training = prepare(config)
    log, main = MetricsLog(training), training.accelerator.is_main_process
    if main:
        record_start(config, training.start.step)
    journal = Journal(Path(config.output_dir), main)
    best = Best(config, training.held_out.id)
    before = (training.start.checkpoint or log.path).parent  # where its checkpoints lie
    from_main(training.accelerator, lambda: best.recall(log.history, before))
    try:
        with Endings(training, journal, best) as endings:
            return _steps(training, log, journal, endings)
    finally:
        journal.close()


def _steps(training: Training, log: MetricsLog, journal: Journal, endings: Endings) -> Path:
    config, bulletin = training.config, Bulletin(training, journal)
    watches = {
        part: Watch(run.config.watch, log.history_of(part)) for part, run in training.runs.items()
    }
    selection = Selection(training, log, journal, endings)
    selection.resumed()
    last, seen = config.train.max_steps, set()
    steps = range(training.start.step, last)
    bar = tqdm(steps, "train", last, initial=training.start.step, disable=not training.shows)
    for step in bar:
        run = training.at(step)
        part = run.stage.part.name
        collected = collect(run, step)
        require_scores(run, collected)
        scores, ids = collected.all_scores.table, collected.all_group_ids
        advantages = group_advantages(scores, run.weights, ids, run.config.grpo)
        own = collected.own(advantages.values)
        with endings.updating():
            learned = learn(run, collected.rollouts, own, first=part not in seen)
        seen.add(part)
        keep_samples(run, collected, own, learned, step + 1)
        metrics = step_metrics(run, collected, advantages, learned)
        metrics |= watches[part](metrics)
        log.write(part, metrics, collected.rollouts, step + 1)
        bulletin.step(part, metrics, step + 1)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}")
        require_updates(run)
        if (step + 1) % config.train.save_steps == 0 or step + 1 == last:
            endings.save()
        selection.after(step + 1)
        heed_alarm(run, watches[part], journal, metrics)
    selection.tell()
    bulletin.end({part: watch.steps for part, watch in watches.items()}, endings.newest)
    return endings.newest
