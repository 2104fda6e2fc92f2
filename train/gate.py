"""What must hold before the first update; otherwise training refuses to start."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from duet.configs.errors import UserError
from duet.configs.pictures import Stored
from duet.inference.engine import Engine
from duet.inference.flow import shift_mu
from duet.inference.layout import Size, upsample_prior
from duet.inference.model import Unread
from duet.inference.request import Request
from duet.inference.rollout import Rollout
from duet.inference.sources import source_grid, source_size
from duet.train.gap import Gap
from duet.train.stages import Stage

_SEED = 12345
# difference of pixels in [0, 1], by the precision of the forward: in float32 the largest. In the
# others the mean, since among many pixels some round far: a right engine's is at most 1.6e-3 in
# bfloat16 (24 pictures, their largest 0.018 to 0.05), and 3.5e-3 where guidance is 3 % too strong
_PIXEL_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-3, "float16": 1e-3}
# arguments of the DiT that must be the stock pipeline's to the bit
_TOLD = (
    "timestep",
    "target_size",
    "crop_coords",
    "prior_token_id",
    "prior_token_drop",
    "encoder_hidden_states",
)


def check_schedule(engine: Engine, size: Size) -> None:
    """Our timesteps and sigmas are those that the checkpoint's scheduler sets."""
    ours = engine.denoising(size).schedule
    scheduler = engine.pipeline.scheduler
    config = scheduler.config
    timesteps = ours.timesteps.cpu().numpy()
    scheduler.set_timesteps(
        timesteps=timesteps,
        sigmas=timesteps / config.num_train_timesteps,
        mu=shift_mu(size.dit_tokens, config),
    )
    for name, mine, theirs in (
        ("timesteps", ours.timesteps, scheduler.timesteps),
        ("sigmas", ours.sigmas, scheduler.sigmas),
    ):
        difference = float((mine.cpu() - theirs.cpu()).abs().max())
        if difference > 1e-4:
            _refuse(f"the schedule's {name} differ from the scheduler's by {difference:.3g}")


@torch.no_grad()
def check_reference(
    engine: Engine, prompt: str, size: Size, precision: str, sources: Sequence[Stored] = ()
) -> None:
    """The DiT is told what stock `GlmImagePipeline` tells it, and the pictures are equal.

    Both draw one picture from the same prior tokens and noise. What is told is compared call
    by call, so that in low precision too one timestep's difference cannot hide in rounding.
    """
    made = compare_with_stock(engine, prompt, size, sources)
    ours, theirs = made.ours.calls, made.stock.calls
    if len(ours) != len(theirs):
        _refuse(
            f"the engine runs the DiT {len(ours)} times for a picture, "
            f"GlmImagePipeline {len(theirs)} times"
        )
    for number, (told, reference) in enumerate(zip(ours, theirs, strict=True)):
        for name in _TOLD:
            _compare(name, told[name], reference[name], number)
    apart = np.abs(made.ours.pixels - made.stock.pixels)
    difference = float(apart.max() if precision == "float32" else apart.mean())
    allowed = _PIXEL_TOLERANCE[precision]
    if not difference <= allowed:
        _refuse(
            f"the engine's picture differs from GlmImagePipeline's by {difference:.3g} "
            f"(allowed {allowed:g})"
        )


def _compare(name: str, ours: Tensor, stock: Tensor, forward: int) -> None:
    if ours.shape != stock.shape:
        shapes = f"{tuple(ours.shape)} and not {tuple(stock.shape)}"
        _refuse(f"the DiT's {name} has shape {shapes} as GlmImagePipeline's, in forward {forward}")
    if not torch.equal(ours.double(), stock.double()):
        difference = float((ours.double() - stock.double()).abs().max())
        _refuse(
            f"the DiT's {name} differs from GlmImagePipeline's by {difference:.3g} "
            f"in forward {forward}"
        )


@dataclass(frozen=True)
class Told:
    """One picture, and what the DiT was told on the way: the arguments of every forward."""

    calls: list[dict[str, Tensor]]
    pixels: np.ndarray  # float32 [1, H, W, 3] in [0, 1]


@dataclass(frozen=True)
class Comparison:
    ours: Told
    stock: Told


def compare_with_stock(
    engine: Engine, prompt: str, size: Size, sources: Sequence[Stored] = ()
) -> Comparison:
    """One picture by the engine and by the stock pipeline, from the same prior and noise.

    Any prior tokens serve, of the sources too, so the AR is not asked for them.
    """
    request = _any_request(engine, prompt, size, sources)
    prior, pipeline, sampling = request.prior[None], engine.pipeline, engine.sampling
    # the stock pipeline runs where its parts are: `decode` has brought those that it needs
    with _listening(pipeline.transformer) as ours:
        pixels = engine.decode([request], [prior])[0].pixels
    with _listening(pipeline.transformer) as theirs, engine.arithmetic():
        reference = pipeline(
            prompt=prompt,
            height=size.height,
            width=size.width,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            prior_token_ids=upsample_prior(prior, size.grid).to(engine.device),
            latents=request.noise[None].to(engine.device),
            output_type="np",
            **_stock_sources(request, engine.device),
        ).images
    return Comparison(Told(ours, pixels), Told(theirs, reference))


def _any_request(engine: Engine, prompt: str, size: Size, sources: Sequence[Stored]) -> Request:
    """A ready request for one picture, with tokens that nobody was asked for."""
    draw = torch.Generator().manual_seed(_SEED)

    def tokens(of: Size) -> Tensor:
        return torch.randint(engine.codebook_size, (of.grid.count,), generator=draw)

    processor = engine.pipeline.processor.image_processor
    request = Request(
        prompt,
        (_SEED,),
        size,
        tuple(sources),
        prior=tokens(size),
        noise=engine.initial_noise(_SEED, size),
        source_tokens=tuple(tokens(source_size(processor, source)) for source in sources),
    )
    return engine.ready(request)


def _stock_sources(request: Request, device: torch.device) -> dict[str, list]:
    """A ready request's sources as arguments of the stock pipeline."""
    if not request.sources:
        return {}
    grids = [source_grid(picture) for picture in request.sources]
    pairs = zip(request.source_tokens, grids, strict=True)
    tokens = torch.cat([upsample_prior(own, grid)[0] for own, grid in pairs])
    return {
        "image": list(request.sources),
        "prior_token_image_ids": [tokens.to(device)],
        "source_image_grid_thw": [torch.tensor([[1, 2 * g.height, 2 * g.width] for g in grids])],
    }


def check_edit(
    engine: Engine, prompt: str, sources: Sequence[Stored], size: Size, precision: str
) -> None:
    """`check_reference` of an edit; and where its AR was read, the positions of the prompt are
    those that the AR itself works out for its ids."""
    check_reference(engine, prompt, size, precision, sources)
    ar = engine.pipeline.vision_language_encoder
    if isinstance(ar, Unread):
        return
    request = _any_request(engine, prompt, size, sources)
    ours = engine.prompt(request)
    grids = [*map(source_grid, request.sources), *ours.grids]
    of_grids = torch.tensor([[1, grid.height, grid.width] for grid in grids])
    positions, _ = ar.model.get_rope_index(ours.ids[None], of_grids)
    if not torch.equal(positions[:, 0], ours.positions):
        _refuse(f"the AR's own positions are others than the engine's for prompt {prompt!r}")


@contextmanager
def _listening(dit: Module) -> Iterator[list[dict[str, Tensor]]]:
    calls: list[dict[str, Tensor]] = []

    def listen(module, args, kwargs):
        # a source's tokens come to stock's DiT without a batch
        told = {name: torch.atleast_2d(kwargs[name].detach().cpu()) for name in _TOLD}
        calls.append({name: value.clone() for name, value in told.items()})

    handle = dit.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def check_gap(stage: Stage, rollouts: Sequence[Rollout], rescored: Tensor, precision: str) -> None:
    """What trains is what sampled: `rescored`, [B, T] by the training forward at the update's
    batch geometry, differs from the sampler's log-probs by no more than rounding, in any group.
    """
    bounds, start = stage.bounds(precision), 0
    groups: list[_Group] = []
    for rollout in rollouts:
        sampled = stage.sampled(rollout)
        own = rescored[start : start + len(rollout), -sampled.shape[1] :]
        groups.append(_Group(rollout.request.prompt, Gap.of(own, sampled)))
        start += len(rollout)
    refused = [group for group in groups if bounds.broken(group.gap)]
    if not refused:
        return
    worst = max(refused, key=lambda g: math.inf if math.isnan(g.gap.mean) else g.gap.mean)
    if math.isnan(worst.gap.mean):
        _refuse(f"log-probs are NaN or infinite for prompt {worst.prompt!r}")
    _refuse(
        "the ratio is not 1: log-probs of the training forward are not the sampler's: "
        f"{'; '.join(bounds.broken(worst.gap))} for prompt {worst.prompt!r} ({worst.gap})"
    )


@dataclass(frozen=True)
class _Group:
    prompt: str
    gap: Gap


def _refuse(reason: str) -> None:
    raise UserError(f"training refuses to start: {reason}")
