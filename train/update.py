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
from duet.train.run import Run
from duet.train.stages import Scored, Stage, sampled_logprobs, taken_actions


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


def references(run: Run, batches: Sequence[MicroBatch]) -> list[list[Scored | None]]:
    """Each piece of each micro-batch by the policy's reference; None where no KL is asked for.

    Before a step's updates, for all of them (as TRL's ref_per_token_logps).
    """
    pieces = [run.stage.pieces(batch.rollouts) for batch in batches]
    if run.config.grpo.beta == 0:
        return [[None] * len(parts) for parts in pieces]
    with (
        run.policy.reference() as module,
        tqdm(pieces, desc="reference", leave=False, disable=not run.shows) as bar,
    ):
        return [[run.stage.score(p.rollouts, module) for p in parts] for parts in bar]


@dataclass(frozen=True)
class Updated:
    metrics: dict[str, float]  # over all processes
    skipped: dict[int, Tensor]  # samples of this process whose update was: their log-probs [T]


@dataclass(frozen=True)
class Old:
    """Log-probs [B, T] of the step's actions before its updates."""

    sampled: Tensor  # as the sampler recorded them
    rescored: Tensor | None  # by the training forward; None: the first forward's own
    trainer: bool  # whose the ratio starts from; `rescored` is asked for then alone
    cap: float  # of the importance weight
    taken: Tensor | None  # bool [B, T]; None: every sample has all T

    def taken_of(self, index: list[int], actions: slice) -> Tensor | None:
        """Which actions these samples have."""
        return None if self.taken is None else self.taken[index][:, actions]

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
) -> Updated:
    """`num_iterations` passes over the rollout in micro-batches; metrics over all processes.

    `rescored`: what `rescore` gave, where the ratio starts from the trainer's log-probs and a
    rollout has several updates, or dropout. A single one's own forward is the trainer's.
    """
    accelerator, policy, grpo = run.accelerator, run.policy, run.config.grpo
    # of the accelerator, which the parts of a run share
    accelerator.gradient_accumulation_steps = run.config.optim.gradient_accumulation_steps
    accelerator.step = 0  # a rollout begins with an update
    device = accelerator.device
    advantages = advantages.to(device)
    sampled = sampled_logprobs(run.stage, rollouts, device)
    trainer = run.config.old_logprobs_of == "trainer"
    taken = taken_actions(run.stage, rollouts, device)
    before = Old(sampled, rescored, trainer, grpo.importance_sampling_cap, taken)
    batches = micro_batches(rollouts, run.config.optim.per_device_train_batch_size)
    own = torch.full((len(sampled),), run.stage.actions, device=device)
    own = own if taken is None else taken.sum(1)
    counts = Counts(own, float(accelerator.reduce(own.sum().float(), "mean")) / len(batches))
    totals, begun, pending, skipped, skips = Totals(), [], {}, {}, 0
    compared = list(zip(batches, references(run, batches), strict=True))
    schedule = [(p, *each) for p in range(grpo.num_iterations) for each in compared]
    bar = tqdm(schedule, desc="update", leave=False, disable=not run.shows)
    for passed, batch, reference in bar:
        with accelerator.accumulate(policy.module):
            gain = advantages[batch.index]
            done = _backward(run, batch, before, reference, gain, counts, totals)
            made = policy.step(done.loss)
        if trainer and passed == 0:
            all_taken = torch.ones_like(done.old) if taken is None else taken[batch.index]
            begun.append(torch.stack([done.old, sampled[batch.index], all_taken]).flatten(1))
        pending |= zip(batch.index, done.logprobs, strict=True)
        if made is not None:
            totals.add({"grad_norm": made.grad_norm, "grad_rms": made.grad_rms})
            if not made.made:
                skipped |= pending
                skips += 1
            pending = {}
    metrics = totals.reduce(accelerator) | {"updates/skipped": float(skips)}
    if trainer:
        told = accelerator.gather(torch.cat(begun, 1).T)  # [actions, 3]
        metrics |= Gap.of(*told[told[:, 2] > 0, :2].unbind(1)).metrics()
    metrics |= {"learning_rate": policy.scheduler.get_last_lr()[0]}
    return Updated(metrics, skipped)


@dataclass(frozen=True)
class Backward:
    """A micro-batch whose gradients are added up."""

    loss: Tensor  # scalar
    logprobs: Tensor  # [B, T], by the weights of the moment
    old: Tensor  # [B, T], what the ratio starts from


def _backward(
    run: Run,
    batch: MicroBatch,
    before: Old,
    references: Sequence[Scored | None],  # of its pieces
    advantages: Tensor,
    counts: Counts,
    totals: Totals,
) -> Backward:
    """Piece by piece; what it tells is added to `totals`. Within `accelerator.accumulate`."""
    grpo, policy, losses, logprobs, olds = run.config.grpo, run.policy, [], [], []
    # dropout must stay on until backward has computed again what it needs
    with policy.training() as module:
        pieces = run.stage.pieces(batch.rollouts)
        for piece, reference in zip(pieces, references, strict=True):
            with policy.synchronising(piece is pieces[-1]):
                scored = run.stage.score(piece.rollouts, module)
                old, weight = before.under(scored, batch.index, piece.actions)
                kl = None if reference is None else run.stage.kl(scored, reference)
                taken = before.taken_of(batch.index, piece.actions)
                actions = Actions(scored.logprobs, old, advantages, kl, weight, taken)
                result = policy_loss(actions, grpo, counts.of(batch.index))
                run.accelerator.backward(result.loss)
            told = result.metrics
            if scored.entropy is not None:
                told = told | {"entropy": actions.mean(scored.entropy)}
            # a mean over the step's actions, wherever an edit has few of them
            share = scored.logprobs.shape[1] / run.stage.actions
            totals.add(told, actions.count / (counts.batch * share))
            losses.append(result.loss.detach())
            logprobs.append(scored.logprobs.detach())
            olds.append(old)
    made = Backward(torch.stack(losses).sum(), torch.cat(logprobs, 1), torch.cat(olds, 1))
    totals.add({"loss": made.loss})
    return made
