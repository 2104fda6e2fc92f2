"""The two stages: what is asked of the engine, what the policy did, and how likely that was."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad

from duet.configs.schema import RunConfig
from duet.inference import decoder
from duet.inference.batching import pack
from duet.inference.engine import Engine
from duet.inference.flow import Gaussian
from duet.inference.layout import Size
from duet.inference.parts import AR, DECODER, Part
from duet.inference.prompt import text_grids
from duet.inference.request import Request
from duet.inference.rollout import LatentTrajectory, Rollout
from duet.inference.samples import Samples, join
from duet.train.gap import Bounds
from duet.train.loss import k3_kl
from duet.train.prior_cache import PriorCache
from duet.train.prior_tokens import Priors, make_priors
from duet.train.prompts import Group, derive_seed


@dataclass(frozen=True)
class Scored(Samples):
    """Actions of B samples under the weights that scored them."""

    per_sample = ("logprobs", "entropy", "gaussian")

    logprobs: Tensor  # float32 [B, T], nats
    entropy: Tensor | None = None  # [B, T], nats: of the AR
    gaussian: Gaussian | None = None  # mean [B, T, C, h, w]: of the decoder


@dataclass(frozen=True)
class Piece:
    """Actions that one backward pass goes through."""

    rollouts: list[Rollout]
    actions: slice  # which columns of [B, T]


class Stage(Protocol):
    """An action is a visual token (AR) or a denoising step (decoder).

    T of them a sample in every step, batch and process; one with fewer has zeros in front.
    """

    part: Part
    engine: Engine
    size: Size
    actions: int  # T

    def priors(self, groups: Sequence[Group]) -> list[Priors | None]:
        """The prior tokens int64 [h * w] that a group's samples share: the decoder's."""

    def requests(
        self, groups: Sequence[Group], priors: Sequence[Priors | None] | None = None
    ) -> list[Request]:
        """What a step asks of the engine, all its groups at once; `priors`: if made before."""

    def window(self, step: int) -> range:
        """The SDE steps of a rollout."""

    def sampled(self, rollout: Rollout) -> Tensor:
        """Log-probs as the sampler recorded them, [N, the rollout's own number of actions]."""

    def pieces(self, rollouts: Sequence[Rollout]) -> list[Piece]:
        """A micro-batch, in as many backward passes as memory asks for."""

    def forwards(self, rollouts: Sequence[Rollout]) -> int:
        """How many forwards `score` runs the module for them."""

    def score(self, rollouts: Sequence[Rollout], module: Module, forwards: int = 0) -> Scored:
        """The actions of all samples by the module's weights of the moment.

        With `forwards`, in at least so many; those beyond its own count for nothing.
        """

    def kl(self, scored: Scored, reference: Scored) -> Tensor:
        """[B, T], of the policy to the reference."""

    def bounds(self, precision: str) -> Bounds:
        """What the gate allows between the sampler's log-probs and the training forward's."""


class ArStage:
    """Policy: the AR. Fixed within a group: the initial noise, and so every decoder step."""

    part = AR

    def __init__(self, engine: Engine, config: RunConfig) -> None:
        self.engine = engine
        self.size = Size.of(config.sampling)
        # an edit has the large grid alone
        self.actions = sum(grid.count for grid in text_grids(self.size))

    def priors(self, groups: Sequence[Group]) -> list[None]:
        return [None for _ in groups]

    def requests(
        self, groups: Sequence[Group], priors: Sequence[None] | None = None
    ) -> list[Request]:
        return [_request(self.engine, group, self.size) for group in groups]

    def window(self, step: int) -> range:
        return range(0)

    def sampled(self, rollout: Rollout) -> Tensor:
        return rollout.tokens.logprobs

    def pieces(self, rollouts: Sequence[Rollout]) -> list[Piece]:
        return [Piece(list(rollouts), slice(None))]

    def forwards(self, rollouts: Sequence[Rollout]) -> int:
        return 1

    def score(self, rollouts: Sequence[Rollout], module: Module, forwards: int = 0) -> Scored:
        scores = self.engine.score_tokens([r.tokens for r in rollouts], module)
        return Scored(*(at_end(x, self.actions) for x in (scores.logprobs, scores.entropy)))

    def kl(self, scored: Scored, reference: Scored) -> Tensor:
        return k3_kl(scored.logprobs, reference.logprobs)

    def bounds(self, precision: str) -> Bounds:
        """Cached and full attention round differently; through d residual layers that adds up
        like a random walk, sqrt(d) times the dtype's epsilon.

        Measured on the tiny model (3 layers), worst of 24 groups: 4.8 of that in float32, 0.7
        in bfloat16, where broken engines have 1.7 to 45 (configs/tiny/RESULTS.md). That it
        grows so up to 40 layers is inferred: `duet.launch.real_size` measures it.
        """
        depth = self.engine.pipeline.vision_language_encoder.config.text_config.num_hidden_layers
        unit = torch.finfo(getattr(torch, precision)).eps * math.sqrt(depth)
        mean = (100 if precision == "float32" else 1.5) * unit
        return Bounds(mean, 20 * mean)


class DecoderStage:
    """Policy: the DiT. Fixed within a group: prior tokens and initial noise."""

    part = DECODER

    def __init__(self, engine: Engine, config: RunConfig) -> None:
        self.engine, self.config = engine, config
        self.size = Size.of(config.sampling)
        self.actions = config.sde.window_size
        self.cache = PriorCache.of(config)

    def requests(
        self, groups: Sequence[Group], priors: Sequence[Priors] | None = None
    ) -> list[Request]:
        asked = [_request(self.engine, group, self.size) for group in groups]
        given = self.priors(groups) if priors is None else priors
        return [
            replace(r, prior=own.tokens[0], source_tokens=own.sources or None)
            for r, own in zip(asked, given, strict=True)
        ]

    def priors(self, groups: Sequence[Group]) -> list[Priors]:
        if self.cache is not None:
            return [self.cache.prior(group) for group in groups]
        rows, seeds = [g.row for g in groups], [(g.fixed_seed,) for g in groups]
        made = make_priors(self.engine, self.size, self.config.rollout.priors, rows, seeds)
        return [Priors(p.tokens.cpu(), tuple(t.cpu() for t in p.sources)) for p in made]

    def window(self, step: int) -> range:
        """One window for all groups of a step, so within each group too."""
        sde = self.config.sde
        draw = np.random.default_rng(derive_seed(self.config.seed, step, 1))
        start = int(draw.integers(sde.window_start_max + 1))
        return range(start, start + sde.window_size)

    def sampled(self, rollout: Rollout) -> Tensor:
        return rollout.latents.logprobs

    def pieces(self, rollouts: Sequence[Rollout]) -> list[Piece]:
        window = self.config.sde.window_size
        at_once = self.config.optim.steps_per_backward or window
        return [
            Piece([replace(r, latents=r.latents.steps(part)) for r in rollouts], part)
            for part in (slice(k, k + at_once) for k in range(0, window, at_once))
        ]

    def forwards(self, rollouts: Sequence[Rollout]) -> int:
        return sum(map(decoder.forwards, _alike(_split(rollouts))[1]))

    def score(self, rollouts: Sequence[Rollout], module: Module, forwards: int = 0) -> Scored:
        order, batches = _alike(_split(rollouts))
        own = join([self._replay(batch, module) for batch in batches])
        for _ in range(forwards - sum(map(decoder.forwards, batches))):
            # in the graph too: its backward waits for other processes as well
            idle = self.engine.idle_forward(batches[0], module)
            own = replace(own, logprobs=own.logprobs + idle)
        return own.select([order.index(i) for i in range(len(order))])

    def _replay(self, alike: LatentTrajectory, module: Module) -> Scored:
        scores = self.engine.score_steps(alike, module)
        return Scored(scores.logprobs, gaussian=scores.gaussian)

    def kl(self, scored: Scored, reference: Scored) -> Tensor:
        return scored.gaussian.kl(reference.gaussian)

    def bounds(self, precision: str) -> Bounds:
        """Sampling and replay run one forward; only the batch's shape may round differently.

        Measured on the tiny model: 4e-8 in float32; in bfloat16 up to 1.2e-3 for single actions,
        one of which is the p99 of a group's few.
        A group has few actions of nearly one log-prob: how wide they spread tells nothing.
        """
        if precision == "float32":
            return Bounds(1e-6, 1e-5, sharpness=math.inf)
        return Bounds(1.5e-4, 2.4e-3, sharpness=math.inf)


def _split(rollouts: Sequence[Rollout]) -> list[LatentTrajectory]:
    return [sample for rollout in rollouts for sample in rollout.latents.split()]


def _alike(samples: Sequence[LatentTrajectory]) -> tuple[list[int], list[LatentTrajectory]]:
    """Batches of one shape each, which one forward takes; and the samples' places in them."""
    batches = pack(samples, len(samples), key=lambda sample: sample.given.kind)
    order = [i for batch in batches for i in batch]
    return order, [join([samples[i] for i in batch]) for batch in batches]


def _request(engine: Engine, group: Group, size: Size) -> Request:
    noise = engine.initial_noise(group.fixed_seed, size)
    return Request(group.row["prompt"], group.seeds, size, group.row.sources, noise=noise)


def sampled_logprobs(stage: Stage, rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    """Of all samples in their order, [B, T]."""
    return torch.cat([at_end(stage.sampled(r), stage.actions) for r in rollouts]).to(device)


def taken_actions(stage: Stage, rollouts: Sequence[Rollout], device: torch.device) -> Tensor | None:
    """Which of T actions each sample has, bool [B, T]; None: all."""
    own = [torch.ones_like(stage.sampled(r), dtype=torch.bool) for r in rollouts]
    if all(x.shape[1] == stage.actions for x in own):
        return None
    return torch.cat([at_end(x, stage.actions) for x in own]).to(device)


def at_end(values: Tensor, count: int) -> Tensor:
    """[..., T'] -> [..., count], zeros in front."""
    return pad(values, (count - values.shape[-1], 0))


STAGES = {stage.part.name: stage for stage in (ArStage, DecoderStage)}
