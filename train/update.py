"""One rollout's updates of the policy, in micro-batches."""

from collections.abc import Sequence

import torch
from duet.inference.rollout import Rollout
from duet.train.loss import policy_loss
from duet.train.metrics import Means
from duet.train.setup import Run
from duet.train.stages import select_samples
from tqdm import tqdm


def update(run: Run, rollouts: Sequence[Rollout], advantages: torch.Tensor) -> dict:
    """`num_iterations` passes over the rollout in micro-batches; metrics over all processes."""
    config, accelerator = run.config, run.accelerator
    means, ratios = Means(), []
    batches = micro_batches(rollouts, config.optim.per_device_train_batch_size)
    passes = config.grpo.num_iterations
    bar = tqdm(total=passes * len(batches), desc="update", leave=False, disable=not run.shows)
    for _ in range(passes):
        for parts, sample_ids in batches:
            with accelerator.accumulate(run.policy):
                with accelerator.autocast():
                    scored = run.stage.score(parts, run.policy, with_kl=config.grpo.beta > 0)
                gain = advantages[sample_ids].to(scored.logprobs.device)
                result = policy_loss(scored.logprobs, scored.old, gain, config.grpo, scored.kl)
                accelerator.backward(result.loss)
                if accelerator.sync_gradients:
                    trained = [p for p in run.policy.parameters() if p.requires_grad]
                    norm = accelerator.clip_grad_norm_(trained, config.optim.max_grad_norm)
                    means.add("grad_norm", torch.as_tensor(norm))
                run.optimizer.step()
                if accelerator.sync_gradients:
                    run.scheduler.step()
                run.optimizer.zero_grad()
            ratios.append(result.ratio.flatten())
            means.add("loss", result.loss.detach())
            means.add("clip_ratio/low_mean", result.clipped_low)
            means.add("clip_ratio/high_mean", result.clipped_high)
            means.add("clip_ratio/region_mean", result.clipped_low | result.clipped_high)
            if scored.kl is not None:
                means.add("kl", scored.kl.detach())
            if scored.entropy is not None:
                means.add("entropy", scored.entropy)
            bar.update()
    bar.close()
    ratio = accelerator.gather(torch.cat(ratios))
    metrics = means.reduce(accelerator) | {
        "ratio/mean": float(ratio.mean()),
        "ratio/min": float(ratio.min()),
        "ratio/max": float(ratio.max()),
        "learning_rate": run.scheduler.get_last_lr()[0],
    }
    return metrics


def micro_batches(rollouts: Sequence[Rollout], size: int) -> list[tuple[list[Rollout], list[int]]]:
    """Consecutive samples, `size` at a time: their rollout slices and sample indices."""
    places = [(r, n) for r, rollout in enumerate(rollouts) for n in range(len(rollout.images))]
    batches = []
    for start in range(0, len(places), size):
        chosen = places[start : start + size]
        slices = []
        for r in sorted({r for r, _ in chosen}):
            slices.append(select_samples(rollouts[r], [n for q, n in chosen if q == r]))
        batches.append((slices, list(range(start, start + len(chosen)))))
    return batches
