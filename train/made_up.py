"""Inputs of a step's pieces, of the right shapes and without meaning."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from duet.configs.policy_schema import SamplingConfig, SdeConfig
from duet.inference import autoregressive, decoder
from duet.inference.decoding import TokenJob
from duet.inference.flow import Schedule
from duet.inference.layout import Size
from duet.inference.prompt import Prompt, text_grids
from duet.inference.rollout import Conditions, Denoising, LatentTrajectory, TokenTrajectory
from duet.inference.sources import Source
from duet.train.kinds import Kinds

PROMPT_TOKENS, GLYPH_TOKENS = 128, 32  # assumed; the visual tokens are many more
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together."""

    sampling: SamplingConfig
    samples: int
    groups: int = 1  # of how many prompts they are
    kinds: Kinds = Kinds()  # the sampler's batches have a single one

    def group(self, sample: int) -> int:
        return sample * self.groups // self.samples


@dataclass(frozen=True)
class Scoring:
    """What one training forward scores."""

    sampling: SamplingConfig
    sde: SdeConfig
    samples: int
    steps: int  # of the decoder's window
    groups: int = 1
    kinds: Kinds = Kinds()

    @property
    def batch(self) -> Batch:
        return Batch(self.sampling, self.samples, self.groups, self.kinds)


def token_jobs(batch: Batch) -> list[TokenJob]:
    prompts = [_prompt(batch.sampling, batch.kinds.edit) for _ in range(batch.groups)]
    return [TokenJob(prompts[batch.group(i)], 0) for i in range(batch.samples)]


def _prompt(
    sampling: SamplingConfig, sources: tuple[Size, ...], words: int = PROMPT_TOKENS
) -> Prompt:
    ids = torch.zeros(words + sum(s.grid.count for s in sources), dtype=torch.int64)
    grids = (Size.of(sampling).grid,) if sources else text_grids(Size.of(sampling))
    return Prompt(ids, ids.expand(3, -1), len(ids), grids)


def noise(dit: Module, batch: Batch) -> Tensor:
    latent = Size.of(batch.sampling).latent
    return torch.zeros(batch.samples, dit.config.in_channels, *latent)


def conditions(dit: Module, batch: Batch) -> Conditions:
    size, width, samples = Size.of(batch.sampling), dit.config.text_embed_dim, batch.samples
    glyphs, null = (torch.zeros(n, GLYPH_TOKENS, width, dtype=dit.dtype) for n in (samples, 1))
    prior = torch.zeros(samples, size.dit_tokens, dtype=torch.int64)
    sources = None
    if batch.kinds.edit:
        groups = [tuple(_source(dit, s) for s in batch.kinds.edit) for _ in range(batch.groups)]
        sources = [groups[batch.group(i)] for i in range(samples)]
    return Conditions(glyphs, prior, null, size, sources)


def _source(dit: Module, size: Size) -> Source:
    latents = torch.zeros(dit.config.in_channels, *size.latent)
    return Source(latents, torch.zeros(size.dit_tokens, dtype=torch.int64))


def token_scorer(asked: Scoring, ar: Module) -> Callable[[], Any]:
    """A training forward of the AR, on actions of any value."""
    codebook = ar.config.vq_config.num_embeddings
    written = [_written(asked.sampling, *each, codebook) for each in _scored(asked)]
    return lambda: autoregressive.score_tokens(ar, written, codebook, _CPU)


def _scored(asked: Scoring) -> list[tuple[Prompt, int]]:
    """Prompts and how many samples each has: where kinds are mixed one is text. A forward pads
    them to one length: here that is the text's.
    """
    kinds = asked.kinds.single()
    counts = [1, asked.samples - 1] if len(kinds) == 2 else [asked.samples]
    made = [_prompt(asked.sampling, kind.edit) for kind in kinds]
    lengths = [len(prompt.ids) + prompt.count for prompt in made]
    padded = [PROMPT_TOKENS + max(lengths) - length for length in lengths]
    prompts = [_prompt(asked.sampling, k.edit, n) for k, n in zip(kinds, padded, strict=True)]
    return list(zip(prompts, counts, strict=True))


def _written(
    sampling: SamplingConfig, prompt: Prompt, samples: int, codebook: int
) -> TokenTrajectory:
    shape, support = (samples, prompt.count), None
    if sampling.top_k or sampling.top_p < 1:
        support = torch.zeros(*shape, -(-codebook // 8), dtype=torch.uint8)
    ids, logprobs = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    return TokenTrajectory(prompt, sampling.temperature, ids, logprobs, support)


def scored_tokens(asked: Scoring) -> int:
    """Visual tokens of which the forward has logits, of each sample."""
    return max(prompt.count for prompt, _ in _scored(asked))


def step_scorer(asked: Scoring, dit: Module) -> Callable[[], Any]:
    """A training forward of the DiT, on actions of any value."""
    steps, batch = asked.steps, asked.batch
    times = torch.zeros(asked.sampling.num_inference_steps + 1)
    schedule = Schedule(times[:-1], times)
    how = Denoising(schedule, asked.sampling.guidance_scale, asked.sde, range(steps))
    noisy = noise(dit, batch)[:, None].repeat(1, steps + 1, 1, 1, 1)
    walked = LatentTrajectory(conditions(dit, batch), how, noisy, torch.zeros(asked.samples, steps))
    return lambda: decoder.score_steps(dit, walked, _CPU)
