"""What must hold before the first update; otherwise training refuses to start."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from duet.configs.errors import UserError
from duet.inference.engine import Engine
from duet.inference.flow import shift_mu
from duet.inference.rollout import Request, Rollout

# largest difference of a pixel in [0, 1] and of a log-prob in nats, by precision
_PIXEL_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}
_LOGPROB_FACTOR = {"float32": 1.0, "bfloat16": 2000.0, "float16": 300.0}
_SEED = 12345


def check_schedule(engine: Engine, height: int, width: int) -> None:
    """Our timesteps and sigmas are those that the checkpoint's scheduler sets."""
    ours = engine.schedule(height, width)
    scheduler = engine.pipeline.scheduler
    config = scheduler.config
    timesteps = ours.timesteps.cpu().numpy()
    scheduler.set_timesteps(
        timesteps=timesteps,
        sigmas=timesteps / config.num_train_timesteps,
        mu=shift_mu((height // 16) * (width // 16), config),
    )
    for name, mine, theirs in (
        ("timesteps", ours.timesteps, scheduler.timesteps),
        ("sigmas", ours.sigmas, scheduler.sigmas),
    ):
        difference = float((mine.cpu() - theirs.cpu()).abs().max())
        if difference > 1e-4:
            _refuse(f"the schedule's {name} differ from the scheduler's by {difference:.3g}")


@torch.no_grad()
def check_reference(engine: Engine, prompt: str, height: int, width: int, dtype: str) -> None:
    """Our ODE picture equals the stock pipeline's for the same prior tokens and noise."""
    difference = reference_difference(engine, prompt, height, width)
    allowed = _PIXEL_TOLERANCE[dtype]
    if not difference <= allowed:
        _refuse(
            f"the engine's picture differs from GlmImagePipeline's by {difference:.3g} "
            f"(allowed {allowed:g})"
        )


@torch.no_grad()
def reference_difference(engine: Engine, prompt: str, height: int, width: int) -> float:
    """Largest pixel difference to the stock pipeline, pictures in [0, 1]."""
    noise = engine.initial_noise(_SEED, height, width)
    asked = Request(prompt, (_SEED,), height, width, noise=noise)
    prior = engine.sample_priors([asked])[0]
    asked = Request(prompt, (_SEED,), height, width, prior_tokens=prior, noise=noise)
    ours = engine.final_pixels(asked)
    theirs = engine.reference_pixels(asked)
    return float(np.abs(ours - theirs).max())


@torch.no_grad()
def check_ratio(stage, rollouts: Sequence[Rollout], model, dtype: str) -> float:
    """Recomputed log-probs equal the rollout's for every sample; returns the worst difference.

    In low precision too, none may begin outside the range in which the ratio is not clipped.
    """
    allowed = stage.tolerance_nats * _LOGPROB_FACTOR[dtype]
    allowed = min(allowed, math.log1p(stage.config.grpo.epsilon))
    worst = 0.0
    for rollout in rollouts:
        scored = stage.score([rollout], model, with_kl=False)
        difference = (scored.logprobs - scored.old).abs()
        worst = max(worst, float(difference.max()))
        if not bool((difference <= allowed).all()):
            _refuse(
                f"the ratio is not 1: recomputed log-probs differ from the rollout's by "
                f"{worst:.3g} nats (allowed {allowed:g}) for prompt {rollout.request.prompt!r}"
            )
    return worst


def _refuse(reason: str) -> None:
    raise UserError(f"training refuses to start: {reason}")
