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
from duet.train.loss import Actions, Counts, policy_loss, truncated_weight
from duet.train.metrics import Totals
from duet.train.setup import Run
from duet.train.stages import Piece, Scored, Stage, sampled_logprobs


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
    bar = tqdm(batches, desc="old log-probs", leave=False, disable=not show)
    return torch.cat([stage.score(batch.rollouts, module).logprobs for batch in bar])


@dataclass(frozen=True)
class Old:
    """Log-probs [B, T] of the step's actions before its updates."""

    sampled: Tensor  # as the sampler recorded them
    rescored: Tensor | None  # by the training forward; None: the first forward's own
    trainer: bool  # whose the ratio starts from; `rescored` is asked for then alone
    cap: float  # of the importance weight

    def under(
        self, scored: Scored, index: list[int], actions: slice
    ) -> tuple[Tensor, Tensor | None]:
        """What the ratio of these samples' actions starts from, and its importance weight."""
        sampled = self.sampled[index][:, actions]
        if not self.trainer:
            return sampled, None
        own = scored.logprobs.detach()
        old = own if self.rescored is None else self.rescored[index][:, actions]
        return old, truncated_weight(old, sampled, self.cap)


def update(
    run: Run, rollouts: Sequence[Rollout], advantages: Tensor, rescored: Tensor | None
) -> dict[str, float]:
    """`num_iterations` passes over the rollout in micro-batches; metrics over all processes.

    `rescored`: what `rescore` gave, where the ratio starts from the trainer's log-probs and a
    rollout has several updates, or dropout. A single one's own forward is the trainer's.
    """
    accelerator, policy, grpo = run.accelerator, run.policy, run.config.grpo
    device = accelerator.device
    advantages = advantages.to(device)
    sampled = sampled_logprobs(run.stage, rollouts, device)
    trainer = run.config.old_logprobs_of == "trainer"
    before = Old(sampled, rescored, trainer, grpo.importance_sampling_cap)
    batches = micro_batches(rollouts, run.config.optim.per_device_train_batch_size)
    total = torch.tensor(float(sampled.numel()), device=device)
    counts = Counts(sampled.shape[1], float(accelerator.reduce(total, "mean")) / len(batches))
    totals, begun = Totals(), []
    schedule = [(p, b) for p in range(grpo.num_iterations) for b in batches]
    for passed, batch in tqdm(schedule, desc="update", leave=False, disable=not run.shows):
        losses = []
        # dropout must stay on until backward has computed again what it needs
        with accelerator.accumulate(policy.module), policy.training() as module:
            pieces = run.stage.pieces(batch.rollouts)
            for piece in pieces:
                with policy.synchronising(piece is pieces[-1]):
                    scored = run.stage.score(piece.rollouts, module)
                    old, weight = before.under(scored, batch.index, piece.actions)
                    kl = _kl(run, piece, scored) if grpo.beta > 0 else None
                    gains = advantages[batch.index]
                    actions = Actions(scored.logprobs, old, gains, kl, weight)
                    result = policy_loss(actions, grpo, counts)
                    accelerator.backward(result.loss)
                totals.add(result.metrics)
                losses.append(result.loss.detach())
                if scored.entropy is not None:
                    totals.add({"entropy": scored.entropy.mean()})
                if trainer and passed == 0:
                    own = sampled[batch.index][:, piece.actions]
                    begun.append(torch.stack([old, own]).flatten(1))
            norm = policy.step()
        totals.add({"loss": torch.stack(losses).sum()})
        if norm is not None:
            totals.add({"grad_norm": norm})
    metrics = totals.reduce(accelerator)
    if trainer:
        pairs = accelerator.gather(torch.cat(begun, 1).T)  # [actions, 2]
        metrics |= Gap.of(*pairs.unbind(1)).metrics()
    return metrics | {"learning_rate": policy.scheduler.get_last_lr()[0]}


def _kl(run: Run, piece: Piece, scored: Scored) -> Tensor:
    with run.policy.reference() as module:
        reference = run.stage.score(piece.rollouts, module)
    return run.stage.kl(scored, reference)
