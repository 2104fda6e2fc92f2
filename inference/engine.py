"""The only door to the model: requests in, rollouts out.

Training rollouts, evaluation and final generation all come through here.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import GlmImagePipeline
from duet.configs.errors import UserError
from duet.configs.schema import SamplingConfig, SdeConfig
from duet.inference import autoregressive, decoder
from duet.inference.decoder import Conditions
from duet.inference.flow import Schedule, make_schedule
from duet.inference.layout import generation_grids, large_grid, split_grids, upsample_prior
from duet.inference.rollout import LatentTrajectory, Request, Rollout, TokenTrajectory, seeded
from PIL import Image
from torch import Tensor
from tqdm import tqdm


class Engine:
    """Samples and scores with the parts of a GLM-Image checkpoint.

    `batch_size` caps the samples run at once; results do not depend on it.
    """

    def __init__(
        self,
        pipeline: GlmImagePipeline,
        sampling: SamplingConfig,
        sde: SdeConfig = SdeConfig(),
        batch_size: int = 16,
        progress: bool = True,
    ) -> None:
        self.pipeline = pipeline
        self.sampling = sampling
        self.sde = sde
        self.batch_size = batch_size
        self.progress = progress
        self.null_glyphs = decoder.glyph_embedding(pipeline, "")[None]

    @property
    def device(self) -> torch.device:
        return self.pipeline.transformer.device

    @property
    def codebook_size(self) -> int:
        return self.pipeline.vision_language_encoder.config.vq_config.num_embeddings

    def rollout(self, requests: Sequence[Request], window: range = range(0)) -> list[Rollout]:
        """Run every request: tokens (unless given), then latents, then pictures.

        The steps in `window` are SDE steps and kept; the rest is ODE.
        Raises UserError for source images and for sizes that do not fit.
        """
        for request in requests:
            self._check(request)
        trajectories = self._sample_tokens(requests)
        priors = [self._priors(r, t) for r, t in zip(requests, trajectories, strict=True)]
        decoded = self._sample_latents(requests, priors, window)
        return [
            Rollout(request, decoder.to_images(pixels), prior, tokens, latents)
            for request, prior, tokens, (pixels, latents) in zip(
                requests, priors, trajectories, decoded, strict=True
            )
        ]

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """Final pictures: pure ODE."""
        return self.rollout(requests)

    def sample_priors(self, requests: Sequence[Request]) -> list[Tensor]:
        """Large-grid tokens [h * w] of each request's first seed, without a picture."""
        for request in requests:
            self._check(request)
        return [
            self._priors(r, t)[0]
            for r, t in zip(requests, self._sample_tokens(requests), strict=True)
        ]

    def final_pixels(self, request: Request) -> np.ndarray:
        """Float pixels [N, H, W, 3] in [0, 1] of a request that fixes its prior tokens."""
        self._check(request)
        return self._sample_latents([request], [self._priors(request, None)], range(0))[0][0]

    def reference_pixels(self, request: Request) -> np.ndarray:
        """The same by stock `GlmImagePipeline`, for a request that fixes prior and noise."""
        large = large_grid(request.height, request.width)
        return self.pipeline(
            prompt=request.prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=self.sampling.num_inference_steps,
            guidance_scale=self.sampling.guidance_scale,
            prior_token_ids=upsample_prior(request.prior_tokens[None], large).to(self.device),
            latents=request.noise[None].to(self.device),
            output_type="np",
        ).images

    def token_logprobs(
        self, trajectories: Sequence[TokenTrajectory], model=None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [sum N, T] under the current weights.

        `model`: the module to run, where a wrapper (DDP) must see the forward.
        """
        model = model or self.pipeline.vision_language_encoder
        return autoregressive.token_logprobs(model, trajectories, self.codebook_size, self.device)

    def step_logprobs(self, trajectory: LatentTrajectory, model=None) -> Tensor:
        """Log-probs [N, K] of the trained steps under the current weights."""
        return self.step_transitions(trajectory, model)[0]

    def step_transitions(self, trajectory: LatentTrajectory, model=None) -> tuple:
        """Log-probs [N, K], means and stds [N * K, ...] of the trained steps."""
        schedule = self.schedule(
            trajectory.height, trajectory.width, trajectory.num_inference_steps
        )
        return decoder.step_transitions(
            model or self.pipeline.transformer,
            trajectory,
            schedule,
            self.null_glyphs,
            self.sampling.guidance_scale,
            self.sde,
        )

    def schedule(self, height: int, width: int, steps: int | None = None) -> Schedule:
        tokens = large_grid(height, width).count * 4
        made = make_schedule(
            steps or self.sampling.num_inference_steps, tokens, self.pipeline.scheduler.config
        )
        return Schedule(made.timesteps.to(self.device), made.sigmas.to(self.device))

    def initial_noise(self, seed: int, height: int, width: int) -> Tensor:
        """Float32 [C, h, w]; equals the pipeline's draw from the same seed."""
        channels = self.pipeline.transformer.config.in_channels
        shape = channels, height // 8, width // 8
        return torch.randn(shape, generator=seeded(seed, "noise"))

    @torch.no_grad()
    def encode_prior(self, image: Image.Image, height: int, width: int) -> Tensor:
        """The large-grid tokens [h * w] that the AR's own vision tower gives a picture."""
        ar = self.pipeline.vision_language_encoder
        inputs = self.pipeline.processor.image_processor(
            images=[image.convert("RGB").resize((width, height))], return_tensors="pt"
        ).to(self.device)
        grid = inputs["image_grid_thw"]
        wanted = large_grid(height, width)
        if grid[0].tolist() != [1, wanted.height, wanted.width]:
            raise UserError(
                f"a reference image of {height} x {width} pixels gives the token grid "
                f"{grid[0].tolist()[1:]}: the image processor's size limits exclude it"
            )
        features = ar.get_image_features(inputs["pixel_values"], grid).pooler_output
        return ar.get_image_tokens(features, grid).cpu()

    def _check(self, request: Request) -> None:
        if request.source_images:
            raise UserError(
                f"request {request.prompt!r} carries {len(request.source_images)} source images: "
                "image-to-image is not served yet, give none"
            )
        if not request.prompt.strip():
            raise UserError("prompt = '' is empty: say what to draw")
        if not request.seeds:
            raise UserError(f"request {request.prompt!r} has no seeds: give one a sample")
        try:
            large = large_grid(request.height, request.width)
        except ValueError as error:
            raise UserError(str(error)) from error
        prior = request.prior_tokens
        if prior is not None and tuple(prior.shape) != (large.count,):
            raise UserError(
                f"prior_tokens of shape {tuple(prior.shape)}: allowed is {(large.count,)}"
            )
        if prior is not None and not 0 <= int(prior.min()) <= int(prior.max()) < self.codebook_size:
            raise UserError(f"prior_tokens must be ids from 0 to {self.codebook_size - 1}")

    def _sample_tokens(self, requests: Sequence[Request]) -> list[TokenTrajectory | None]:
        trajectories: list[TokenTrajectory | None] = [None] * len(requests)
        open_requests = [i for i, r in enumerate(requests) if r.prior_tokens is None]
        for size in sorted({(requests[i].height, requests[i].width) for i in open_requests}):
            same = [i for i in open_requests if (requests[i].height, requests[i].width) == size]
            grids = generation_grids(*size)
            for batch in self._packed(requests, same):
                with self._bar(sum(g.count for g in grids), "AR tokens") as bar:
                    sampled = autoregressive.sample_tokens(
                        self.pipeline.vision_language_encoder,
                        [self._prompt_ids(requests[i]) for i in batch],
                        [requests[i].seeds for i in batch],
                        grids,
                        self.codebook_size,
                        self.sampling.temperature,
                        self.sampling.top_k,
                        self.sampling.top_p,
                        bar.update,
                    )
                for i, trajectory in zip(batch, sampled, strict=True):
                    trajectories[i] = trajectory
        return trajectories

    def _packed(self, requests: Sequence[Request], indices: Sequence[int]) -> list[list[int]]:
        """Whole requests in batches of about `batch_size` samples."""
        batches: list[list[int]] = []
        room = 0
        for i in indices:
            if not batches or len(requests[i].seeds) > room:
                batches.append([])
                room = self.batch_size
            batches[-1].append(i)
            room -= len(requests[i].seeds)
        return batches

    def _prompt_ids(self, request: Request) -> Tensor:
        content = [{"type": "text", "text": request.prompt}]
        inputs = self.pipeline.processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            tokenize=True,
            return_dict=True,
            processor_kwargs={
                "target_h": request.height,
                "target_w": request.width,
                "return_tensors": "pt",
            },
        )
        return inputs["input_ids"][0]

    def _priors(self, request: Request, trajectory: TokenTrajectory | None) -> Tensor:
        if trajectory is None:
            return request.prior_tokens.cpu().expand(len(request.seeds), -1)
        return split_grids(trajectory.tokens, trajectory.grids)[1]

    def _sample_latents(
        self, requests: Sequence[Request], priors: Sequence[Tensor], window: range
    ) -> list[tuple[np.ndarray, LatentTrajectory | None]]:
        glyphs = [decoder.glyph_embedding(self.pipeline, r.prompt) for r in requests]
        samples = [(i, n) for i, r in enumerate(requests) for n in range(len(r.seeds))]
        # one size and one glyph length a batch, so that nothing is padded
        kinds = [(requests[i].height, requests[i].width, len(glyphs[i])) for i, _ in samples]
        batches = decoder.equal_batches(kinds, self.batch_size)
        results: dict[tuple[int, int], tuple] = {}
        steps = self.sampling.num_inference_steps
        with self._bar(len(samples) * steps, "denoising") as bar:
            for batch in batches:
                chosen = [samples[b] for b in batch]
                results |= self._denoise(requests, priors, glyphs, chosen, window, bar)
        decoded = []
        for i, request in enumerate(requests):
            rows = [results[i, n] for n in range(len(request.seeds))]
            latents = None
            if window:
                large = large_grid(request.height, request.width)
                latents = LatentTrajectory(
                    glyphs=glyphs[i],
                    prior_tokens=upsample_prior(priors[i], large),
                    latents=torch.stack([kept for _, kept, _ in rows]),
                    logprobs=torch.stack([logprobs for _, _, logprobs in rows]),
                    window=window,
                    num_inference_steps=steps,
                    height=request.height,
                    width=request.width,
                )
            decoded.append((np.stack([pixels for pixels, _, _ in rows]), latents))
        return decoded

    def _denoise(self, requests, priors, glyphs, chosen, window: range, bar) -> dict:
        """One batch of (request, sample) pairs of equal size and glyph length."""
        first = requests[chosen[0][0]]
        large = large_grid(first.height, first.width)
        given = Conditions(
            torch.stack([glyphs[i] for i, _ in chosen]),
            self.null_glyphs,
            upsample_prior(torch.stack([priors[i][n] for i, n in chosen]), large).to(self.device),
            first.height,
            first.width,
            self.sampling.guidance_scale,
        )
        final, kept, logprobs = decoder.sample_latents(
            self.pipeline.transformer,
            torch.stack([self._noise(requests[i], n) for i, n in chosen]).to(self.device),
            self.schedule(first.height, first.width),
            given,
            self.sde,
            window,
            [seeded(requests[i].seeds[n], "sde") for i, n in chosen] if window else (),
            lambda: bar.update(len(chosen)),
        )
        pixels = decoder.decode_pixels(self.pipeline.vae, final)
        rows = zip(pixels, kept.cpu(), logprobs.cpu(), strict=True)
        return dict(zip(chosen, rows, strict=True))

    def _noise(self, request: Request, sample: int) -> Tensor:
        if request.noise is not None:
            return request.noise.float()
        return self.initial_noise(request.seeds[sample], request.height, request.width)

    def _bar(self, total: int, name: str) -> tqdm:
        return tqdm(total=total, desc=name, leave=False, disable=not self.progress)
