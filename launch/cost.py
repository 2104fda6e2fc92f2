"""What a step computes and moves, and how long a card takes over it: an estimate."""

from collections import Counter
from dataclasses import dataclass

from duet.configs.schema import RunConfig
from duet.train.footprint import Kernel, repeated
from duet.train.memory import Step
from duet.train.workload import weight_bytes


@dataclass(frozen=True)
class Card:
    """As its maker's data sheet has it."""

    name: str
    flops: float  # a second, dense, bfloat16
    bandwidth: float  # bytes a second, of its memory
    gib: int


CARDS = {
    "h100": Card("H100 SXM", 989e12, 3350e9, 80),
    "h200": Card("H200", 989e12, 4800e9, 141),
    "a100": Card("A100 80GB", 312e12, 2039e9, 80),
    "l40s": Card("L40S", 362e12, 864e9, 48),
    "4090": Card("RTX 4090", 165e12, 1008e9, 24),
}
# assumed: shares of a card's figures that eager PyTorch reaches, the least time of a kernel,
# and what a copy between CPU and GPU moves a second
COMPUTE, MEMORY, LAUNCH_SECONDS, COPY_BANDWIDTH = 0.5, 0.7, 10e-6, 10e9


@dataclass(frozen=True)
class Cost:
    """Of one phase of a step, on one process."""

    phase: str
    kernels: Counter[Kernel]
    copied: int = 0  # bytes between CPU and GPU

    @property
    def flops(self) -> float:
        return float(sum(k.flops * count for k, count in self.kernels.items()))

    @property
    def bytes(self) -> float:
        return float(sum(k.bytes * count for k, count in self.kernels.items()))

    def seconds(self, card: Card) -> float:
        """Each kernel takes the longest of its computing, its memory and its launch."""
        flops, bandwidth = card.flops * COMPUTE, card.bandwidth * MEMORY
        return self.copied / COPY_BANDWIDTH + sum(
            count * max(k.flops / flops, k.bytes / bandwidth, LAUNCH_SECONDS)
            for k, count in self.kernels.items()
        )


def costs(config: RunConfig, step: Step) -> list[Cost]:
    found = [
        Cost("latents", repeated(step.latents.kernels, step.latent_batches)),
        Cost("pixels", repeated(step.pixels.kernels, step.pictures)),
        Cost("update", repeated(step.update.kernels, step.updates)),
    ]
    if step.source:
        found.insert(0, Cost("sources", repeated(step.source.kernels, step.sources)))
    if step.tokens:
        found.insert(0, Cost("AR tokens", repeated(step.tokens.kernels, step.token_batches)))
    if step.reference:
        found.append(Cost("reference", repeated(step.reference.kernels, step.references)))
    if step.rescores:
        found.append(Cost("old log-probs", repeated(step.rescore.kernels, step.rescores)))
    if config.model.offload == "phase":
        found.append(Cost("parts to and from the CPU", Counter(), _copied(config, step)))
    return found


def _copied(config: RunConfig, step: Step) -> int:
    """AR and decoder change places once a step, or once a batch where the AR's stage samples.
    Without the AR the DiT stays.
    """
    parts = step.read if step.tokens else (c for c in step.read if c != "transformer")
    swaps = step.latent_batches if config.stage == "ar" else 1
    return 2 * swaps * sum(weight_bytes(step.subject, part) for part in parts)
