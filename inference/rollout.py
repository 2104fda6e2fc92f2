"""What goes into the engine and what comes out, field by field.

N samples of one prompt, T visual tokens, K trained denoising steps, V codebook
ids, latents [C, h, w] = [16, height / 8, width / 8].
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from duet.inference.layout import Grid
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One group: a prompt and a seed for every sample of it."""

    prompt: str
    seeds: tuple[int, ...]  # N; each drives that sample's tokens, noise and SDE steps
    height: int  # pixels
    width: int
    source_images: tuple[Image.Image, ...] = ()
    prior_tokens: Tensor | None = None  # int64 [h * w], the large grid, for all samples
    noise: Tensor | None = None  # float32 [C, h, w], the initial noise, for all samples


@dataclass(frozen=True)
class TokenTrajectory:
    """The AR's actions on one prompt: preview, then large grid."""

    prompt_ids: Tensor  # int64 [P], no padding
    grids: tuple[Grid, Grid]
    tokens: Tensor  # int64 [N, T]
    logprobs: Tensor  # float32 [N, T], nats
    temperature: float
    support: np.ndarray | None  # uint8 [N, T, ceil(V / 8)] bits of kept ids; None: all kept

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, index: Sequence[int]) -> "TokenTrajectory":
        support = None if self.support is None else self.support[list(index)]
        return TokenTrajectory(
            self.prompt_ids,
            self.grids,
            self.tokens[list(index)],
            self.logprobs[list(index)],
            self.temperature,
            support,
        )


@dataclass(frozen=True)
class LatentTrajectory:
    """The decoder's actions on one prompt: the SDE steps of the window."""

    glyphs: Tensor  # [L, D] glyph embedding of the prompt
    prior_tokens: Tensor  # int64 [N, 2h * 2w] at the DiT's resolution
    latents: Tensor  # float32 [N, K + 1, C, h, w]; step k goes from k to k + 1
    logprobs: Tensor  # float32 [N, K], nats, mean over latent dimensions
    window: range  # the K step indices in the schedule
    num_inference_steps: int
    height: int  # pixels
    width: int

    def __len__(self) -> int:
        return len(self.latents)

    def select(self, index: Sequence[int]) -> "LatentTrajectory":
        index = list(index)
        return LatentTrajectory(
            self.glyphs,
            self.prior_tokens[index],
            self.latents[index],
            self.logprobs[index],
            self.window,
            self.num_inference_steps,
            self.height,
            self.width,
        )


@dataclass(frozen=True)
class Rollout:
    """N samples of one request."""

    request: Request
    images: list[Image.Image] = field(repr=False)
    prior_tokens: Tensor  # int64 [N, h * w], the large grid
    token_trajectory: TokenTrajectory | None = None  # None: the prior tokens were given
    latent_trajectory: LatentTrajectory | None = None  # None: pure ODE

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.request.seeds


def seeded(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one use of a sample's seed.

    Initial noise takes the seed itself, so that it equals what
    `GlmImagePipeline(generator=torch.Generator().manual_seed(seed))` draws.
    """
    if purpose != "noise":
        digest = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
        seed = int(digest[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)
