"""One rollout's updates of the policy, in micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from duet.inference.batching import pack
from duet.inference.rollout import Rollout
from duet.train.gap import Gap
from duet.train.loss import Actions, policy_loss, truncated_weight
from duet.train.metrics import Totals
from duet.train.setup import Run
from duet.train.stages import Scored, Stage, sampled_logprobs


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward and backward."""

    rollouts: list[Rollout]  # slices of the step's
    index: list[int]  # of the samples, counted through the step's rollouts


def micro_batches(rollouts: Sequence[Rollout], size: int) -> list[MicroBatch]:
    """Consecutive samples, `size` at a time."""
    owners = [r for r, rollout in enumerate(rollouts) for _ in range(len(rollout))]
    starts = [owners.index(r) for r in range(len(rollouts))]
    batches = []
    for index in pack(owners, size):
        parts = [
            rollouts[r].select([i - starts[r] for i in index if owners[i] == r])
            for r in sorted({owners[i] for i in index})
        ]
        batches.append(MicroBatch(parts, index))
    return batches


@torch.no_grad()
def rescore(
    stage: Stage, module: Module, rollouts: Sequence[Rollout], batch_size: int, show: bool = False
) -> Tensor:
    """Log-probs [B, T] by the training forward, at the update's own micro-batches."""
    batches = micro_batches(rollouts, batch_size)
    with tqdm(batches, desc="old log-probs", leave=False, disable=not show) as bar:
        return torch.cat([stage.score(batch.rollouts, module).logprobs for batch in bar])


@dataclass(frozen=True)
class Updated:
    metrics: dict[str, float]  # over all processes
    skipped: dict[int, Tensor]  # samples of this process whose update was: their log-probs [T]


def update(
    run: Run, rollouts: Sequence[Rollout], advantages: Tensor, rescored: Tensor | None
) -> Updated:
    """`num_iterations` passes over the rollout in micro-batches; metrics over all processes.

    `rescored`: what `rescore` gave, where the ratio starts from the trainer's log-probs and a
    rollout has several updates. A single one's own forward is the trainer's.
    """
    accelerator, policy, grpo = run.accelerator, run.policy, run.config.grpo
    device = accelerator.device
    advantages = advantages.to(device)
    sampled = sampled_logprobs(run.stage, rollouts, device)
    trainer = run.config.old_logprobs_of == "trainer"
    batches = micro_batches(rollouts, run.config.optim.per_device_train_batch_size)
    counts = torch.tensor(float(sampled.numel()), device=device)
    mean_actions = float(accelerator.reduce(counts, "mean")) / len(batches)
    totals, begun, pending, skipped, skips = Totals(), [], {}, {}, 0
    schedule = [(p, b) for p in range(grpo.num_iterations) for b in batches]
    for passed, batch in tqdm(schedule, desc="update", leave=False, disable=not run.shows):
        with accelerator.accumulate(policy.module):
            scored = run.stage.score(batch.rollouts, policy.module)
            old, weight = sampled[batch.index], None
            if trainer:
                first = scored.logprobs.detach()
                old = first if rescored is None else rescored[batch.index]
                weight = truncated_weight(old, sampled[batch.index], grpo.importance_sampling_cap)
                if passed == 0:
                    begun.append(torch.stack([old, sampled[batch.index]]).flatten(1))
            kl = _kl(run, batch, scored) if grpo.beta > 0 else None
            actions = Actions(scored.logprobs, old, advantages[batch.index], kl, weight)
            result = policy_loss(actions, grpo, mean_actions)
            pending |= zip(batch.index, scored.logprobs.detach().cpu(), strict=True)
            made = policy.update(result.loss)
        totals.add(result.metrics)
        if scored.entropy is not None:
            totals.add({"entropy": scored.entropy.mean()})
        if made is not None:
            totals.add({"grad_norm": made.grad_norm, "grad_rms": made.grad_rms})
            if not made.made:
                skipped |= pending
                skips += 1
            pending = {}
    metrics = totals.reduce(accelerator) | {"updates/skipped": float(skips)}
    if trainer:
        pairs = accelerator.gather(torch.cat(begun, 1).T)  # [actions, 2]
        metrics |= Gap.of(*pairs.unbind(1)).metrics()
    metrics |= {"learning_rate": policy.scheduler.get_last_lr()[0]}
    return Updated(metrics, skipped)


def _kl(run: Run, batch: MicroBatch, scored: Scored) -> Tensor:
    with run.policy.reference() as module:
        reference = run.stage.score(batch.rollouts, module)
    return run.stage.kl(scored, reference)
