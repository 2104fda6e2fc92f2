"""One rollout's updates of the policy, in micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from duet.inference.batching import pack
from duet.inference.rollout import Rollout
from duet.train.gap import Gap
from duet.train.loss import Actions, Counts, policy_loss, truncated_weight
from duet.train.metrics import Totals
from duet.train.run import Run
from duet.train.stages import Piece, Scored, Stage, sampled_logprobs, taken_actions


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


def forwards_of(run: Run, batches: Sequence[Sequence[Rollout]]) -> list[int]:
    """How many forwards each is to be scored in: where a forward waits for the other processes,
    as many as any of them needs. Collective.
    """
    own = [run.stage.forwards(rollouts) for rollouts in batches]
    if not run.policy.sharding.in_step:
        return own
    every = gather_object([own])
    return [max(each) for each in zip(*every, strict=True)]


def rescore(run: Run, rollouts: Sequence[Rollout]) -> Tensor:
    """Log-probs [B, T] by the training forward, at the update's own micro-batches."""
    batches = micro_batches(rollouts, run.config.optim.per_device_train_batch_size)
    forwards = forwards_of(run, [batch.rollouts for batch in batches])
    return replay(run.stage, run.policy.module, batches, forwards, run.shows)


@torch.no_grad()
def replay(
    stage: Stage,
    module: Module,
    batches: Sequence[MicroBatch],
    forwards: Sequence[int] | None = None,
    show: bool = False,
) -> Tensor:
    """Log-probs [B, T] by the module; `forwards`: of `forwards_of`, or None of one process."""
    counted = list(zip(batches, forwards or [0] * len(batches), strict=True))
    with tqdm(counted, desc="old log-probs", leave=False, disable=not show) as bar:
        return torch.cat([stage.score(b.rollouts, module, n).logprobs for b, n in bar])


@dataclass(frozen=True)
class Part:
    """What one backward pass of a micro-batch goes through."""

    piece: Piece
    forwards: int
    reference: Scored | None  # None where no KL is asked for


def parts_of(run: Run, batches: Sequence[MicroBatch]) -> list[list[Part]]:
    """Of each micro-batch, scored by the policy's reference: before a step's updates, for all
    of them (as TRL's ref_per_token_logps).
    """
    cut = [run.stage.pieces(batch.rollouts) for batch in batches]
    pieces = [piece for own in cut for piece in own]
    forwards = forwards_of(run, [piece.rollouts for piece in pieces])
    parts = [Part(piece, n, None) for piece, n in zip(pieces, forwards, strict=True)]
    if run.config.grpo.beta:
        with (
            run.policy.reference() as module,
            tqdm(parts, desc="reference", leave=False, disable=not run.shows) as bar,
        ):
            score = run.stage.score
            parts = [
                replace(part, reference=score(part.piece.rollouts, module, part.forwards))
                for part in bar
            ]
    walk = iter(parts)
    return [[next(walk) for _ in own] for own in cut]


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
    whole = list(zip(batches, parts_of(run, batches), strict=True))
    schedule = [(p, *each) for p in range(grpo.num_iterations) for each in whole]
    bar = tqdm(schedule, desc="update", leave=False, disable=not run.shows)
    for passed, batch, parts in bar:
        with policy.sharding.accumulating():
            gain = advantages[batch.index]
            done = _backward(run, batch, parts, before, gain, counts, totals)
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
    parts: Sequence[Part],
    before: Old,
    advantages: Tensor,
    counts: Counts,
    totals: Totals,
) -> Backward:
    """Part by part; what it tells is added to `totals`. Within `sharding.accumulating`."""
    grpo, policy, losses, logprobs, olds = run.config.grpo, run.policy, [], [], []
    # dropout must stay on until backward has computed again what it needs
    with policy.training() as module:
        for part in parts:
            with policy.sharding.synchronising(part is parts[-1]):
                scored = run.stage.score(part.piece.rollouts, module, part.forwards)
                old, weight = before.under(scored, batch.index, part.piece.actions)
                kl = None if part.reference is None else run.stage.kl(scored, part.reference)
                taken = before.taken_of(batch.index, part.piece.actions)
                actions = Actions(scored.logprobs, old, advantages, kl, weight, taken)
                result = policy_loss(actions, grpo, counts.of(batch.index))
                policy.sharding.backward(result.loss)
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
