"""What a step logs besides what its updates do: rewards, looks, seconds."""

import torch
from accelerate.utils import gather_object

from duet.inference.together import gather_rows
from duet.train.advantages import Advantages
from duet.train.collect import Collected
from duet.train.learn import Learned
from duet.train.metrics import reward_metrics, score_mean
from duet.train.run import Run
from duet.train.watch import Look, image_metrics


def step_metrics(
    run: Run, collected: Collected, advantages: Advantages, learned: Learned
) -> dict[str, float]:
    """Over all processes, under TRL's names where it has them."""
    scores, sampled = collected.all_scores, collected.sampled
    names = list(scores.trained)
    metrics = learned.metrics | reward_metrics(
        scores.table, run.weights, names, collected.all_group_ids
    )
    metrics |= {f"watch/{n}/mean": score_mean(v) for n, v in scores.watched.items()}
    looks = gather_object([Look.of(i) for r in collected.rollouts for i in r.images])
    metrics |= image_metrics(looks, collected.all_group_ids.tolist())
    metrics |= {"frac_reward_zero_std": advantages.frac_reward_zero_std}
    seconds = {
        "rollout": sampled.rollout_seconds,
        "reward": sampled.reward_seconds,
        "update": learned.seconds,
    }
    # the slowest process holds up the others
    everyone = gather_rows(run.accelerator, torch.tensor([list(seconds.values())]))
    for phase, slowest in zip(seconds, everyone.amax(0).tolist(), strict=True):
        metrics[f"{phase}/seconds"] = slowest
        metrics[f"{phase}/samples_per_second"] = len(collected.all_group_ids) / slowest
    return metrics | {"reward/wait_seconds": sampled.wait_seconds}
