"""GRPO on one module of GLM-Image: rollout, reward, advantage, update, checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from duet.configs.errors import UserError
from duet.configs.schema import RunConfig
from duet.inference.model import module_of
from duet.inference.rollout import Rollout
from duet.train import checkpoint, gate
from duet.train.advantages import group_advantages
from duet.train.metrics import MetricsLog, reward_metrics, timed
from duet.train.prompts import Group, draw_groups, shard
from duet.train.scoring import sample_and_score
from duet.train.setup import Run, prepare
from duet.train.update import update
from duet.train.watch import Watch, image_metrics
from tqdm import tqdm


def train(config: RunConfig) -> Path:
    """Run the config to its last step; returns the newest checkpoint.

    Raises UserError for anything the user can mend.
    """
    run, newest, start = prepare(config)
    log = MetricsLog(run.accelerator, Path(config.output_dir), newest, start)
    watch = Watch(config.watch, log.history)
    steps = tqdm(
        range(start, config.train.max_steps),
        initial=start,
        total=config.train.max_steps,
        desc=f"train {config.stage}",
        disable=not run.shows,
    )
    for step in steps:
        metrics, images = train_step(run, step, first=step == start)
        metrics |= watch(metrics)
        log.write(metrics, step + 1)
        steps.set_postfix(reward=f"{metrics['reward']:.3f}")
        if step % config.train.logging_images_steps == 0:
            log.write_images(images, config.rollout.num_generations, step + 1)
        if (step + 1) % config.train.save_steps == 0 or step + 1 == config.train.max_steps:
            newest = save(run, step + 1)
        heed_alarm(run, watch, metrics, step + 1)
    run.accelerator.end_training()
    return newest


def train_step(run: Run, step: int, first: bool = False) -> tuple[dict, list]:
    """One rollout and its updates: metrics of all processes, pictures of this one."""
    config, accelerator = run.config, run.accelerator
    groups = draw_groups(
        run.rows, config.seed, step, config.rollout.prompts_per_step, config.rollout.num_generations
    )
    mine = shard(groups, accelerator.process_index, accelerator.num_processes)

    def sample(batch: Sequence[Group]) -> list[Rollout]:
        with torch.no_grad(), accelerator.autocast():
            return run.stage.rollout(batch, step)

    rewards = run.rewards | {f"watch/{name}": reward for name, reward in run.watched.items()}
    sampled = sample_and_score(sample, mine, rewards, config.rollout.batch_size, run.shows)
    rollouts, scores = sampled.rollouts, sampled.scores[:, : len(run.rewards)]
    group_ids = torch.tensor([g.id for g in mine for _ in g.seeds])
    all_scores, all_ids = _gather(sampled.scores), _gather(group_ids)
    require_scores(run, all_scores, step)
    advantages = group_advantages(
        scores,
        run.weights,
        group_ids,
        config.grpo.scale_rewards,
        config.grpo.multi_objective_aggregation == "sum_then_normalize",
    )
    if first:
        with accelerator.autocast():
            gate.check_ratio(run.stage, rollouts, run.policy, run.precision)
    metrics, update_seconds = timed(lambda: update(run, rollouts, advantages.values))
    trained, watched = all_scores.tensor_split([len(run.rewards)], dim=1)
    metrics |= reward_metrics(trained, run.weights, list(run.rewards), all_ids)
    metrics |= watched_metrics(run, watched, rollouts)
    zero_std = _gather(torch.tensor([advantages.frac_reward_zero_std]))
    metrics["frac_reward_zero_std"] = float(zero_std.mean())
    seconds = {
        "rollout": sampled.rollout_seconds,
        "reward": sampled.reward_seconds,
        "update": update_seconds,
    }
    # the slowest process holds up the others
    slowest = _gather(torch.tensor([list(seconds.values())])).amax(0).tolist()
    for phase, value in zip(seconds, slowest, strict=True):
        metrics[f"{phase}/seconds"] = value
        metrics[f"{phase}/samples_per_second"] = len(all_scores) / value
    metrics["reward/wait_seconds"] = sampled.wait_seconds
    return metrics, [i for r in rollouts for i in r.images]


def watched_metrics(run: Run, scores: torch.Tensor, rollouts: Sequence[Rollout]) -> dict:
    """Means of the watched rewards, scores [B, W], and of what the pictures look like."""
    means = zip(run.watched, scores.T, strict=True)
    looks = image_metrics(r.images for r in rollouts)
    looks = dict(zip(looks, _gather(torch.tensor([list(looks.values())])).mean(0), strict=True))
    return {f"watch/{name}/mean": float(column.nanmean()) for name, column in means} | {
        name: float(value) for name, value in looks.items()
    }


def require_scores(run: Run, scores: torch.Tensor, step: int) -> None:
    """End the run, with a checkpoint, when a trained reward leaves out too many samples."""
    allowed = run.config.train.max_not_scored
    for name, weight, column in zip(run.rewards, run.weights, scores.T, strict=False):
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


def heed_alarm(run: Run, watch: Watch, metrics: dict, done: int) -> None:
    """Tell that the alarm rang; with `watch.stop`, end the run with a checkpoint."""
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


def save(run: Run, done: int) -> Path:
    """The checkpoint after `done` rollouts, written unless it is there already."""
    policy = module_of(run.stage.engine.pipeline, run.config.stage)
    return checkpoint.save_checkpoint(run.accelerator, run.config, done, policy)


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """The processes' rows, one after another; unequal lengths are fine."""
    return torch.cat([torch.tensor(part) for part in gather_object([tensor.tolist()])])
