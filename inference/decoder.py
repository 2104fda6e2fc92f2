"""The DiT decoder: latents sampled and scored by one transition."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from duet.inference.flow import SDE_STEPS, Gaussian, ode_step
from duet.inference.rollout import Conditions, Denoising, LatentTrajectory, seeded
from duet.inference.samples import join
from duet.inference.source_attention import Seen, SourceAttention, passes, see


def velocity(dit: Module, x: Tensor, timestep: Tensor, seen: Seen, guidance_scale: float) -> Tensor:
    """Guided v, float32 [B, C, h, w]: uncond + scale * (cond - uncond).

    `timestep` is the schedule's, [B]; the model is conditioned on timestep - 1. Sources are in
    the conditional pass alone.
    """
    given = seen.given
    batch, dtype = len(x), given.glyphs.dtype
    size = torch.tensor([[given.size.height, given.size.width]], dtype=dtype, device=x.device)

    def predict(glyphs: Tensor, drop: bool, sources: SourceAttention | None) -> Tensor:
        return dit(
            hidden_states=x.to(dtype),
            encoder_hidden_states=glyphs,
            prior_token_id=given.prior,
            prior_token_drop=torch.full_like(given.prior, drop, dtype=torch.bool),
            timestep=timestep - 1,
            target_size=size.expand(batch, -1),
            crop_coords=torch.zeros_like(size).expand(batch, -1),
            kv_caches=sources,
            return_dict=False,
        )[0].float()

    cond = predict(given.glyphs, False, seen.sources)
    if guidance_scale <= 1:  # the pipeline guides above 1 only
        return cond
    uncond = predict(given.null_glyphs.expand(batch, -1, -1), True, None)
    return uncond + guidance_scale * (cond - uncond)


def transition(dit: Module, x: Tensor, step: Tensor, seen: Seen, how: Denoising) -> Gaussian:
    """The SDE step `step` (int64 [B]) from x [B, C, h, w]: mean [B, C, h, w], std [B, 1, 1, 1].

    Sampling and scoring both come through here.
    """
    schedule = how.schedule
    v = velocity(dit, x, schedule.timesteps[step], seen, how.guidance_scale)
    sigma, sigma_next = (schedule.sigmas[step + i].view(-1, 1, 1, 1) for i in (0, 1))
    return SDE_STEPS[how.sde.kind](x, v, sigma, sigma_next, how.sde.noise_level)


@dataclass(frozen=True)
class LatentJob:
    """One sample to be denoised."""

    given: Conditions  # of this sample alone
    noise: Tensor  # float32 [C, h, w]
    seed: int  # drives the SDE steps


@dataclass(frozen=True)
class Denoised:
    """B samples at the end of the schedule."""

    final: Tensor  # float32 [B, C, h, w]
    trajectory: LatentTrajectory | None  # None: pure ODE


@torch.no_grad()
def sample_latents(
    dit: Module,
    jobs: Sequence[LatentJob],
    asked: Denoising,
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> Denoised:
    """Denoise jobs of one kind: SDE inside the window, ODE outside it."""
    given, how = join([job.given for job in jobs]), asked.to(device)
    generators = [seeded(job.seed, "sde") for job in jobs] if how.window else []
    x = torch.stack([job.noise for job in jobs]).float().to(device)
    seen = see(dit, given.to(device))
    kept, logprobs = [], []
    for i in range(len(how.schedule)):
        step = torch.full((len(x),), i, device=device)
        if i in how.window:
            gaussian = transition(dit, x, step, seen, how)
            draws = [torch.randn(x.shape[1:], generator=g) for g in generators]
            kept.append(x)
            x = gaussian.draw(torch.stack(draws).to(device))
            logprobs.append(gaussian.logprob(x))
            if i + 1 == how.window.stop:
                kept.append(x)
        else:
            v = velocity(dit, x, how.schedule.timesteps[step], seen, how.guidance_scale)
            x = ode_step(x, v, how.schedule.sigmas[i], how.schedule.sigmas[i + 1])
        on_step()
    if not kept:
        return Denoised(x, None)
    latents, scores = torch.stack(kept, 1).cpu(), torch.stack(logprobs, 1).cpu()
    return Denoised(x, LatentTrajectory(given, asked, latents, scores))


@dataclass(frozen=True)
class StepScores:
    """Replayed steps under the weights of the moment."""

    logprobs: Tensor  # float32 [N, K], nats
    gaussian: Gaussian  # mean [N, K, C, h, w]


def score_steps(dit: Module, trajectory: LatentTrajectory, device: torch.device) -> StepScores:
    """Replay the K steps of N samples, all at once."""
    latents, how = trajectory.latents.to(device), trajectory.how.to(device)
    window = how.window
    seen = see(dit, trajectory.given.to(device).repeat_each(len(window)))
    step = torch.tensor(list(window), device=device).repeat(len(latents))
    flat = transition(dit, latents[:, :-1].flatten(0, 1), step, seen, how)
    gaussian = flat.unflatten(len(window))
    logprobs = gaussian.logprob(latents[:, 1:])
    if seen.sources is not None:  # in the graph as a whole, as an engine in parts wants a forward
        logprobs = logprobs + seen.sources.idle
    return StepScores(logprobs, gaussian)


def forwards(trajectory: LatentTrajectory) -> int:
    """How many forwards of the DiT `score_steps` runs."""
    return passes(trajectory.given) + 1 + (trajectory.how.guidance_scale > 1)


def idle_forward(dit: Module, trajectory: LatentTrajectory, device: torch.device) -> Tensor:
    """One forward more, for processes that must run equal numbers: a scalar 0 in its graph."""
    one, how = trajectory.select([0]), trajectory.how.to(device)
    x, timestep = one.latents[:, 0].to(device), how.schedule.timesteps[how.window.start].view(1)
    return 0 * velocity(dit, x, timestep, Seen(one.given.to(device), None), 1.0).sum()
