"""The only door to the model: requests in, rollouts out.

Training rollouts, evaluation and final generation all come through here, and run in one
arithmetic: a policy is its weights and the precision that they are run in.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from diffusers import GlmImagePipeline
from PIL import Image
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from duet.configs.errors import UserError
from duet.configs.policy_schema import AUTOCAST, Arithmetic, SamplingConfig, SdeConfig
from duet.configs.schema import RunConfig
from duet.inference import autoregressive, decoder, decoding, pictures
from duet.inference.autoregressive import TokenScores
from duet.inference.batching import in_batches, pack
from duet.inference.decoder import LatentJob, StepScores, sample_latents
from duet.inference.decoding import TokenJob
from duet.inference.flow import make_schedule
from duet.inference.glyphs import glyph_embedding
from duet.inference.layout import Size, upsample_prior
from duet.inference.placement import Placement
from duet.inference.prompt import Prompt, edit_prompt, text_prompt
from duet.inference.request import Request
from duet.inference.rollout import (
    Conditions,
    Decoded,
    Denoising,
    LatentTrajectory,
    Rollout,
    TokenTrajectory,
    seeded,
)
from duet.inference.samples import Kind, join
from duet.inference.sources import Source, at_size, source_grid, source_size


class Engine:
    """Samples and scores with the parts of a GLM-Image checkpoint.

    `batch_size` caps the samples run at once; results depend on it by rounding alone.
    `autocast` is the dtype of mixed precision, None where the parts run in their own.
    """

    def __init__(
        self,
        pipeline: GlmImagePipeline,
        sampling: SamplingConfig,
        sde: SdeConfig = SdeConfig(),
        batch_size: int = 16,
        autocast: torch.dtype | None = None,
        progress: bool = True,
        placement: Placement | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.placement = placement or Placement(pipeline)
        self.sampling = sampling
        self.sde = sde
        self.batch_size = batch_size
        self.autocast = autocast
        self.progress = progress

    @classmethod
    def of(cls, pipeline: GlmImagePipeline, config: RunConfig, progress: bool = True) -> "Engine":
        """As a run's config has it."""
        autocast = autocast_dtype(config.arithmetic)
        size = config.rollout.batch_size
        placement = Placement(pipeline, config.model)
        return cls(pipeline, config.sampling, config.sde, size, autocast, progress, placement)

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def codebook_size(self) -> int:
        return self.pipeline.vision_language_encoder.config.vq_config.num_embeddings

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The precision of every forward: of sampling, scoring, evaluation and generation."""
        enabled = self.autocast is not None
        with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=enabled):
            yield

    def rollout(self, requests: Sequence[Request], window: range = range(0)) -> list[Rollout]:
        """Run every request: tokens (unless the prior is given), then latents, then pictures.

        The steps in `window` are SDE steps and kept; the rest is ODE.
        """
        requests = [self.ready(request) for request in requests]
        tokens = self.sample_tokens(requests)
        priors = [_prior(r, t) for r, t in zip(requests, tokens, strict=True)]
        decoded = self.decode(requests, priors, window)
        return [
            Rollout(request, pictures.to_images(made.pixels), prior, own, made.latents)
            for request, prior, own, made in zip(requests, priors, tokens, decoded, strict=True)
        ]

    def in_parts(
        self, requests: Sequence[Request], rank: int = 0, of: int = 1
    ) -> Iterator[list[tuple[int, Rollout]]]:
        """Rollouts as they are made, each with its request's place: what memory holds of any
        number of requests is a part, whole requests of about `batch_size` samples.

        The parts are dealt to `of` processes, and are the same for any number of them: so is a
        picture, whichever process makes it.
        """
        parts = pack(requests, self.batch_size, weight=len)[rank::of]
        total = sum(len(requests[i]) for part in parts for i in part)
        with self._bar(total, "pictures") as bar:
            for part in parts:
                # unnamed, or it would be held while the next part is made
                yield list(zip(part, self.rollout([requests[i] for i in part]), strict=True))
                bar.update(sum(len(requests[i]) for i in part))

    def priors(self, requests: Sequence[Request]) -> list[Tensor]:
        """The AR's large grid for every sample, int64 [N, h * w], without a picture."""
        return [_prior(r, t) for r, t in zip(requests, self.sample_tokens(requests), strict=True)]

    def ready(self, request: Request) -> Request:
        """With its sources at their size, the AR's tokens of them, and the size of its pictures.

        Raises UserError for a source that cannot be read or is out of the processor's bounds.
        """
        if not request.sources:
            return request
        processor = self.pipeline.processor.image_processor
        sizes = [source_size(processor, source) for source in request.sources]
        sized = zip(request.sources, sizes, strict=True)
        sources = tuple(at_size(source, size) for source, size in sized)
        tokens = request.source_tokens
        if tokens is None:
            pairs = zip(sources, sizes, strict=True)
            tokens = tuple(self.encode_prior(source, size) for source, size in pairs)
        size = request.size or sizes[0]
        return replace(request, sources=sources, source_tokens=tokens, size=size)

    def score_tokens(self, trajectories: Sequence[TokenTrajectory], model: Module) -> TokenScores:
        """All samples under the current weights; `model`: the AR, or what wraps it (DDP)."""
        self.placement.bring("vision_language_encoder")
        with self.arithmetic():
            return autoregressive.score_tokens(model, trajectories, self.codebook_size, self.device)

    def score_steps(self, trajectory: LatentTrajectory, model: Module) -> StepScores:
        """The trained steps under the current weights; `model`: the DiT, or what wraps it."""
        self.placement.bring("transformer")
        with self.arithmetic():
            return decoder.score_steps(model, trajectory, self.device)

    def idle_forward(self, trajectory: LatentTrajectory, model: Module) -> Tensor:
        """One forward of the DiT that counts for nothing: a scalar 0 in its graph."""
        with self.arithmetic():
            return decoder.idle_forward(model, trajectory, self.device)

    def denoising(self, size: Size, window: range = range(0)) -> Denoising:
        """How a picture of that size is denoised."""
        steps, config = self.sampling.num_inference_steps, self.pipeline.scheduler.config
        schedule = make_schedule(steps, size.dit_tokens, config)
        return Denoising(schedule, self.sampling.guidance_scale, self.sde, window)

    def initial_noise(self, seed: int, size: Size) -> Tensor:
        """Float32 [C, h, w]; equals the pipeline's draw from the same seed."""
        channels = self.pipeline.transformer.config.in_channels
        return torch.randn((channels, *size.latent), generator=seeded(seed, "noise"))

    def encode_prior(self, picture: Image.Image, size: Size) -> Tensor:
        """The large-grid tokens [h * w] that the AR's own vision tower gives a picture."""
        self.placement.bring("vision_language_encoder")
        with self.arithmetic():
            return pictures.encode_prior(self.pipeline, picture, size)

    def sample_tokens(self, requests: Sequence[Request]) -> list[TokenTrajectory | None]:
        """A trajectory a request, None where its prior is given."""
        written = [self.ready(r) for r in requests if r.prior is None]
        if written:
            self.placement.bring("vision_language_encoder")
        prompts = [self.prompt(r) for r in written]
        jobs = [
            TokenJob(p, seed) for p, r in zip(prompts, written, strict=True) for seed in r.seeds
        ]

        def run(batch: list[TokenJob]) -> list[TokenTrajectory]:
            ar = self.pipeline.vision_language_encoder
            with self._bar(batch[0].prompt.count, "AR tokens") as bar, self.arithmetic():
                return decoding.sample_tokens(
                    ar, batch, self.codebook_size, self.sampling, bar.update
                )

        samples = in_batches(jobs, self.batch_size, lambda job: job.prompt.grids, run)
        made = iter(_by_request(samples, written))
        return [next(made) if r.prior is None else None for r in requests]

    def decode(
        self, requests: Sequence[Request], priors: Sequence[Tensor], window: range = range(0)
    ) -> list[Decoded]:
        """Denoise every sample of the requests, each with its prior, int64 [N, h * w]."""
        requests = [self.ready(request) for request in requests]
        self.placement.bring("text_encoder", "transformer", "vae")
        jobs = [
            LatentJob(given, self._noise(request, seed), seed)
            for request, prior in zip(requests, priors, strict=True)
            for given, seed in zip(
                self.conditions(request, prior).split(), request.seeds, strict=True
            )
        ]
        bar = self._bar(len(jobs) * self.sampling.num_inference_steps, "denoising")

        def run(batch: list[LatentJob]) -> list[Decoded]:
            how = self.denoising(batch[0].given.size, window)
            dit, vae = self.pipeline.transformer, self.pipeline.vae
            with self.arithmetic():
                denoised = sample_latents(
                    dit, batch, how, self.device, lambda: bar.update(len(batch))
                )
                pixels = pictures.decode_pixels(vae, denoised.final)
            return Decoded(pixels, denoised.trajectory).split()

        with bar:
            samples = in_batches(jobs, self.batch_size, lambda job: job.given.kind, run)
        return _by_request(samples, requests)

    def conditions(self, request: Request, prior: Tensor) -> Conditions:
        """What the DiT is told for each sample of a ready request, prior int64 [N, h * w].

        Raises UserError for tokens outside the codebook.
        """
        if not 0 <= int(prior.min()) <= int(prior.max()) < self.codebook_size:
            raise UserError(f"prior tokens must be ids from 0 to {self.codebook_size - 1}")
        glyphs = self._glyphs(request.prompt).expand(len(prior), -1, -1)
        upsampled = upsample_prior(prior, request.size.grid)
        sources = [self._sources(request)] * len(prior) if request.sources else None
        return Conditions(glyphs, upsampled, self.null_glyphs, request.size, sources)

    def prompt(self, request: Request) -> Prompt:
        """Of a ready request, for all of its samples."""
        make = edit_prompt if request.sources else text_prompt
        return make(self.pipeline.processor, request)

    def _sources(self, request: Request) -> tuple[Source, ...]:
        """Of a ready request, encoded once for all of its samples."""
        sources = []
        for picture, tokens in zip(request.sources, request.source_tokens, strict=True):
            with self.arithmetic():
                latents = pictures.encode(self.pipeline.vae, picture).cpu()
            upsampled = upsample_prior(tokens, source_grid(picture))[0]
            sources.append(Source(latents, upsampled))
        return tuple(sources)

    @cached_property
    def null_glyphs(self) -> Tensor:
        """[1, L0, D], what guidance contrasts a prompt's with."""
        return self._glyphs("")

    def _glyphs(self, prompt: str) -> Tensor:
        with self.arithmetic():
            glyphs = glyph_embedding(self.pipeline, prompt)
        return glyphs.to("cpu", self.pipeline.transformer.dtype)

    def _noise(self, request: Request, seed: int) -> Tensor:
        return self.initial_noise(seed, request.size) if request.noise is None else request.noise

    def _bar(self, total: int, name: str) -> tqdm:
        """On a terminal alone: elsewhere its carriage returns would fill a log."""
        return tqdm(total=total, desc=name, leave=False, disable=None if self.progress else True)


def _prior(request: Request, tokens: TokenTrajectory | None) -> Tensor:
    if tokens is None:
        return request.prior.cpu().expand(len(request), -1)
    return tokens.prior


def _by_request(samples: Sequence[Kind], requests: Sequence[Request]) -> list[Kind]:
    """Samples in the order of the requests, joined to one a request."""
    walk = iter(samples)
    return [join([next(walk) for _ in request.seeds]) for request in requests]


def autocast_dtype(arithmetic: Arithmetic) -> torch.dtype | None:
    name = AUTOCAST.get(arithmetic.mixed_precision)
    return name and getattr(torch, name)
