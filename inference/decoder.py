"""The DiT decoder: latents sampled and scored by one transition, then pictures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import GlmImagePipeline
from diffusers.image_processor import VaeImageProcessor
from duet.configs.quotes import quoted_spans
from duet.configs.schema import SdeConfig
from duet.inference.flow import SDE_STEPS, Schedule, gaussian_kl, gaussian_logprob, ode_step
from duet.inference.rollout import LatentTrajectory
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """What the DiT is told, for B samples whose glyph embeddings have one length."""

    glyphs: Tensor  # [B, L, D]
    null_glyphs: Tensor  # [1, L0, D], the embedding of ""
    prior_tokens: Tensor  # int64 [B, 2h * 2w]
    height: int  # pixels
    width: int
    guidance_scale: float


@torch.no_grad()
def glyph_embedding(pipeline: GlmImagePipeline, prompt: str) -> Tensor:
    """Glyph embedding [L, D] of the prompt's quoted spans, as `_get_glyph_embeds` makes it.

    One prompt at a time: the reference pads unequal lengths of a batch with zeros
    that the DiT then attends to.
    """
    spans = quoted_spans(prompt) or [""]
    pad = pipeline.tokenizer.pad_token_id
    # the reference's rule: an even number of spans gets a leading pad
    lead = [pad] * ((len(spans) + 1) % 2)
    ids = [lead + i for i in pipeline.tokenizer(spans, truncation=True, max_length=2048).input_ids]
    longest = max(map(len, ids))
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids])
    padded = torch.tensor([i + [pad] * (longest - len(i)) for i in ids])
    device = pipeline.text_encoder.device
    output = pipeline.text_encoder(padded.to(device), attention_mask=mask.to(device))
    return output.last_hidden_state[mask.bool().to(device)]


def velocity(dit, x: Tensor, timestep: Tensor, given: Conditions) -> Tensor:
    """Guided v, float32 [B, C, h, w]: uncond + scale * (cond - uncond).

    `timestep` is the schedule's, [B]; the model is conditioned on timestep - 1.
    """
    batch, dtype = len(x), given.glyphs.dtype
    size = torch.tensor([[given.height, given.width]], dtype=dtype, device=x.device)

    def predict(glyphs: Tensor, drop: bool) -> Tensor:
        return dit(
            hidden_states=x.to(dtype),
            encoder_hidden_states=glyphs,
            prior_token_id=given.prior_tokens,
            prior_token_drop=torch.full_like(given.prior_tokens, drop, dtype=torch.bool),
            timestep=timestep - 1,
            target_size=size.expand(batch, -1),
            crop_coords=torch.zeros_like(size).expand(batch, -1),
            return_dict=False,
        )[0].float()

    cond = predict(given.glyphs, drop=False)
    if given.guidance_scale <= 1:  # the pipeline guides above 1 only
        return cond
    uncond = predict(given.null_glyphs.expand(batch, -1, -1), drop=True)
    return uncond + given.guidance_scale * (cond - uncond)


def transition(
    dit, x: Tensor, step: Tensor, schedule: Schedule, given: Conditions, sde: SdeConfig
) -> tuple[Tensor, Tensor]:
    """Mean [B, C, h, w] and std [B, 1, 1, 1] of the SDE step `step` (int64 [B]) from x.

    Sampling and scoring both come through here.
    """
    v = velocity(dit, x, schedule.timesteps[step], given)
    sigma, sigma_next = (schedule.sigmas[step + i].view(-1, 1, 1, 1) for i in (0, 1))
    return SDE_STEPS[sde.kind](x, v, sigma, sigma_next, sde.noise_level)


@torch.no_grad()
def sample_latents(
    dit,
    noise: Tensor,
    schedule: Schedule,
    given: Conditions,
    sde: SdeConfig | None = None,
    window: range = range(0),
    generators: Sequence[torch.Generator] = (),
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Denoise [B, C, h, w]: SDE inside the window, ODE outside it.

    Returns the final latents, the window's K + 1 latents [B, K + 1, C, h, w] and
    its log-probs [B, K], all float32.
    """
    x, kept, logprobs = noise.float(), [], []
    for i in range(len(schedule)):
        step = torch.full((len(x),), i, device=x.device)
        if i in window:
            mean, std = transition(dit, x, step, schedule, given, sde)
            draws = [torch.randn(x.shape[1:], generator=g) for g in generators]
            kept.append(x)
            x = mean + std * torch.stack(draws).to(x.device)
            logprobs.append(gaussian_logprob(x, mean, std))
            if i + 1 == window.stop:
                kept.append(x)
        else:
            v = velocity(dit, x, schedule.timesteps[step], given)
            x = ode_step(x, v, schedule.sigmas[i], schedule.sigmas[i + 1])
        on_step()
    if not kept:
        return x, x.new_empty(len(x), 0, *x.shape[1:]), x.new_empty(len(x), 0)
    return x, torch.stack(kept, 1), torch.stack(logprobs, 1)


def step_transitions(
    dit,
    trajectory: LatentTrajectory,
    schedule: Schedule,
    null_glyphs: Tensor,
    guidance_scale: float,
    sde: SdeConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replay the K steps of N samples: log-probs [N, K], means and stds [N * K, ...]."""
    device = null_glyphs.device
    latents = trajectory.latents.to(device)
    count, steps = len(latents), len(trajectory.window)
    given = Conditions(
        trajectory.glyphs.to(device).expand(count * steps, -1, -1),
        null_glyphs,
        trajectory.prior_tokens.to(device).repeat_interleave(steps, 0),
        trajectory.height,
        trajectory.width,
        guidance_scale,
    )
    step = torch.tensor(list(trajectory.window), device=device).repeat(count)
    mean, std = transition(dit, latents[:, :-1].flatten(0, 1), step, schedule, given, sde)
    logprobs = gaussian_logprob(latents[:, 1:].flatten(0, 1), mean, std)
    return logprobs.view(count, steps), mean, std


def step_kl(mean: Tensor, mean_ref: Tensor, std: Tensor, steps: int) -> Tensor:
    """Gaussian KL of every replayed step, [N, K]."""
    return gaussian_kl(mean, mean_ref, std).view(-1, steps)


@torch.no_grad()
def decode_pixels(vae, latents: Tensor) -> np.ndarray:
    """Standardised latents [B, C, h, w] -> float32 pixels [B, H, W, 3] in [0, 1]."""
    mean, std = (
        torch.tensor(vae.config[name], device=latents.device).view(1, -1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    pixels = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
    return _PROCESSOR.postprocess(pixels.float(), output_type="np")


def to_images(pixels: np.ndarray) -> list[Image.Image]:
    """Float pixels [B, H, W, 3] -> RGB pictures."""
    return _PROCESSOR.numpy_to_pil(pixels)


_PROCESSOR = VaeImageProcessor(vae_scale_factor=8)


def equal_batches(kinds: Sequence[tuple], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of one kind each (size, glyph length), so that nothing is padded."""
    for kind in sorted(set(kinds)):
        same = [i for i, k in enumerate(kinds) if k == kind]
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]
