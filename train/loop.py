"""GRPO on one module of GLM-Image: rollout, reward, advantage, update, checkpoint."""

from pathlib import Path

from tqdm import tqdm

from duet.configs.schema import RunConfig
from duet.train.advantages import group_advantages
from duet.train.collect import collect
from duet.train.endings import heed_alarm, require_scores, save
from duet.train.learn import learn
from duet.train.lock import alone
from duet.train.log import MetricsLog
from duet.train.setup import prepare
from duet.train.step_metrics import step_metrics
from duet.train.watch import Watch


@alone("output_dir")
def train(config: RunConfig) -> Path:
    """Run the config to its last step; returns the newest checkpoint.

    Raises UserError for anything the user can mend.
    """
    run = prepare(config)
    log = MetricsLog(
        run.accelerator, Path(config.output_dir), run.start, config.train.logging_images_steps
    )
    watch = Watch(config.watch, log.history)
    newest, last = run.start.checkpoint, config.train.max_steps
    steps = range(run.start.step, last)
    bar = tqdm(steps, "train", last, initial=run.start.step, disable=not run.shows)
    for step in bar:
        collected = collect(run, step)
        require_scores(run, collected, step)
        scores, ids = collected.all_scores.table, collected.all_group_ids
        advantages = group_advantages(scores, run.weights, ids, config.grpo)
        own = collected.own(advantages.values)
        learned = learn(run, collected.rollouts, own, first=step == steps.start)
        metrics = step_metrics(run, collected, advantages, learned)
        metrics |= watch(metrics)
        log.write(metrics, collected.rollouts, step + 1)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}")
        if (step + 1) % config.train.save_steps == 0 or step + 1 == last:
            newest = save(run, step + 1)
        heed_alarm(run, watch, metrics, step + 1)
    run.accelerator.end_training()
    return newest
