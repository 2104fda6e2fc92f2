"""What comes out of the engine, field by field: trajectories know how they were sampled.

N samples of one prompt, T visual tokens, K trained denoising steps, V codebook
ids, latents [C, h, w] = [16, height / 8, width / 8].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from duet.configs.policy_schema import SdeConfig
from duet.inference.flow import Schedule
from duet.inference.layout import Size
from duet.inference.prompt import Prompt
from duet.inference.request import Request
from duet.inference.samples import Samples
from duet.inference.sources import Source


@dataclass(frozen=True)
class TokenTrajectory(Samples):
    """The AR's actions on one prompt: its grids, token by token."""

    per_sample = ("tokens", "logprobs", "support")

    prompt: Prompt
    temperature: float
    tokens: Tensor  # int64 [N, T]
    logprobs: Tensor  # float32 [N, T], nats, as the sampler saw them
    support: Tensor | None  # uint8 [N, T, ceil(V / 8)] bits of kept ids; None: all kept

    @property
    def prior(self) -> Tensor:
        """The large grid, int64 [N, h * w]."""
        return self.tokens[:, -self.prompt.grids[-1].count :]


@dataclass(frozen=True)
class Conditions(Samples):
    """What the DiT is told, for N samples of one kind."""

    per_sample = ("glyphs", "prior", "sources")

    glyphs: Tensor  # [N, L, D] glyph embeddings
    prior: Tensor  # int64 [N, 2h * 2w], at the DiT's resolution
    null_glyphs: Tensor  # [1, L0, D], the embedding of ""
    size: Size
    sources: list[tuple[Source, ...]] | None = None  # one tuple for all of a group; None: text

    @property
    def kind(self) -> tuple[Size, int, tuple[Size, ...]]:
        """What must be equal to stand in one batch, so that nothing is padded: the size, the
        glyphs' length, the sizes of the sources in their order."""
        sources = self.sources[0] if self.sources else ()
        return self.size, self.glyphs.shape[1], tuple(source.size for source in sources)

    def repeat_each(self, count: int) -> "Conditions":
        """Every sample `count` times in a row."""
        glyphs, prior = (x.repeat_interleave(count, 0) for x in (self.glyphs, self.prior))
        sources = self.sources and [own for own in self.sources for _ in range(count)]
        return replace(self, glyphs=glyphs, prior=prior, sources=sources)

    def to(self, device: torch.device) -> "Conditions":
        """The sources stay: they are moved when they are read."""
        glyphs, prior, null = (x.to(device) for x in (self.glyphs, self.prior, self.null_glyphs))
        return replace(self, glyphs=glyphs, prior=prior, null_glyphs=null)


@dataclass(frozen=True)
class Denoising:
    """How latents are denoised: a replay asks it, and no engine."""

    schedule: Schedule
    guidance_scale: float
    sde: SdeConfig
    window: range  # steps with noise, the policy's actions; the others follow the ODE

    def to(self, device: torch.device) -> "Denoising":
        timesteps, sigmas = self.schedule.timesteps.to(device), self.schedule.sigmas.to(device)
        return replace(self, schedule=Schedule(timesteps, sigmas))


@dataclass(frozen=True)
class LatentTrajectory(Samples):
    """The decoder's actions on one prompt: the SDE steps of the window."""

    per_sample = ("latents", "logprobs", "given")

    given: Conditions
    how: Denoising
    latents: Tensor  # float32 [N, K + 1, C, h, w]; step k goes from k to k + 1
    logprobs: Tensor  # float32 [N, K], nats, mean over latent dimensions

    def steps(self, part: slice) -> Self:
        """Some of the K steps, by themselves."""
        window = self.how.window[part]
        first = window.start - self.how.window.start
        return replace(
            self,
            how=replace(self.how, window=window),
            latents=self.latents[:, first : first + len(window) + 1],
            logprobs=self.logprobs[:, part],
        )


@dataclass(frozen=True)
class Decoded(Samples):
    """What the decoder made of a request's priors."""

    per_sample = ("pixels", "latents")

    pixels: np.ndarray  # float32 [N, H, W, 3] in [0, 1]
    latents: LatentTrajectory | None  # None: pure ODE


@dataclass(frozen=True)
class Rollout(Samples):
    """N samples of one request."""

    per_sample = ("images", "prior", "tokens", "latents")

    request: Request
    images: list[Image.Image] = field(repr=False)
    prior: Tensor  # int64 [N, h * w], the large grid
    tokens: TokenTrajectory | None  # None: the prior was given
    latents: LatentTrajectory | None  # None: pure ODE

    def select(self, index: Sequence[int]) -> Self:
        seeds = tuple(self.request.seeds[i] for i in index)
        return replace(super().select(index), request=replace(self.request, seeds=seeds))


def seeded(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one use of a sample's seed.

    Initial noise takes the seed itself, so that it equals what
    `GlmImagePipeline(generator=torch.Generator().manual_seed(seed))` draws.
    """
    if purpose != "noise":
        digest = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
        seed = int(digest[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)
