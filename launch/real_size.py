"""GLM-Image at its real size with random weights: does replay equal sampling there?

    python -m duet.launch.real_size [ar] [decoder] [--device cuda] [--group 8] [--sources 1]
        [--small]

Runs the settings of `configs/glm_image/`: for the AR a group over a full 1024 px grid, for the
decoder a window of two SDE steps. Prints the gap between sampler and training forward, what
the gate says of it, seconds, and on a GPU peak memory beside what `duet plan` counts. One part
is built at a time: at real size each needs a GPU with 48 GB. `--small` builds few and narrow
layers and small pictures, for a CPU. With `--sources` it is an edit of so many pictures of its
own size.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import GlmImagePipeline
from PIL import Image

from duet.configs.errors import UserError, exit_on_user_error
from duet.configs.load import load_config
from duet.configs.schema import RunConfig
from duet.inference.adapters import adapter_disabled, add_adapter
from duet.inference.engine import Engine
from duet.inference.model import freeze, load_pipeline, pick_device
from duet.inference.parts import PARTS
from duet.inference.request import Request
from duet.inference.rollout import Rollout
from duet.inference.shapes import (
    Scale,
    build_ar,
    build_dit,
    build_glyph_encoder,
    build_vae,
    default_dtype,
)
from duet.train import gate
from duet.train.gap import Gap
from duet.train.kinds import Datasets, Kinds
from duet.train.memory import DECODER_PARTS, GIB, step_of
from duet.train.recompute import recompute_blocks
from duet.train.stages import STAGES, Stage, sampled_logprobs
from duet.train.tiny.gaps import walk
from duet.train.update import micro_batches, replay
from duet.train.workload import trained_parameters, weight_bytes

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_PROMPT = 'a red card with a blue circle on the left and the white word "CAT"'


REAL, SMALL = Scale(), Scale(4, 256, 2, 1, 3, 2, 64, (32, 32, 64, 64))
SIDE_PIXELS = {REAL: 1024, SMALL: 96}


def build_pipeline(stage: str, scale: Scale, device: torch.device) -> GlmImagePipeline:
    """The stage's own part at scale, bfloat16, random; what it does not run stays tiny."""
    pipeline = load_pipeline(str(_CONFIGS / "tiny" / "model"), "bfloat16", device.type)
    torch.manual_seed(0)
    pad = pipeline.vision_language_encoder.config.text_config.pad_token_id  # of the tiny tokenizer
    builders = {
        "ar": {"vision_language_encoder": lambda: build_ar(scale, pad)},
        "decoder": {
            "transformer": lambda: build_dit(scale),
            "text_encoder": lambda: build_glyph_encoder(scale),
            "vae": lambda: build_vae(scale),
        },
    }[stage]
    with default_dtype(torch.bfloat16), device:
        pipeline.register_modules(**{name: build() for name, build in builders.items()})
    return freeze(pipeline)


def token_rollout(stage: Stage, request: Request) -> Rollout:
    """Tokens alone, with blank pictures: no decoder is built beside the AR."""
    tokens = stage.engine.sample_tokens([request])[0]
    blank = [Image.new("RGB", (1, 1))] * len(request)
    return Rollout(request, blank, tokens.prior, tokens, None)


def latent_rollout(stage: Stage, request: Request) -> Rollout:
    """The window of the first step, from random prior tokens."""
    tokens = request.size.grid.count
    prior = torch.randint(256, (tokens,), generator=torch.Generator().manual_seed(0))
    return stage.engine.rollout([replace(request, prior=prior)], stage.window(0))[0]


ROLLOUTS = {"ar": token_rollout, "decoder": latent_rollout}


def measure(name: str, scale: Scale, device: torch.device, samples: int, sources: int) -> None:
    side = SIDE_PIXELS[scale]
    size = [f"sampling.height={side}", f"sampling.width={side}", f"rollout.batch_size={samples}"]
    group = f"rollout.num_generations={max(2, samples)}"  # a batch is one group
    config = load_config(_CONFIGS / "glm_image" / f"{name}.yaml", [*size, group])
    pipeline = build_pipeline(name, scale, device)
    part, lora = PARTS[name], config.lora
    module = part.module(pipeline)
    add_adapter(module, part, lora.rank, lora.alpha, lora.target_modules)
    walk(module, config.optim.learning_rate)
    if config.optim.gradient_checkpointing:
        recompute_blocks(module, part.block)
    stage = STAGES[name](Engine.of(pipeline, config), config)
    parameters = sum(p.numel() for p in module.parameters())
    print(f"{name}: {parameters / 1e9:.2f} B parameters on {device}, {side} x {side} pixels")
    noise = stage.engine.initial_noise(0, stage.size)
    pictures = tuple(Image.effect_noise((side, side), 100) for _ in range(sources))
    request = Request(_PROMPT, tuple(range(samples)), stage.size, pictures, noise=noise)
    request = stage.engine.ready(request)
    planned = plan(config, scale, Kinds(not sources, (stage.size,) * sources))
    with torch.no_grad():
        rollout = _timed(device, "rollout", planned, lambda: ROLLOUTS[name](stage, request))
    batch = config.optim.per_device_train_batch_size
    batches = micro_batches([rollout], batch)
    again = _timed(device, "replay", planned, lambda: replay(stage, module, batches))
    print(f"  {Gap.of(again, sampled_logprobs(stage, [rollout], again.device))}")
    try:
        gate.check_gap(stage, [rollout], again, config.arithmetic.precision)
        print("  the gate passes")
    except UserError as error:
        print(f"  {error}")
    micro = rollout.select(range(batch))
    backward(stage, module, micro)  # from here on there are gradients
    _timed(device, "update", planned, lambda: backward(stage, module, micro))


def backward(stage: Stage, module: torch.nn.Module, micro: Rollout) -> None:
    """A micro-batch's forward and backward passes, compared with the reference."""
    pieces = stage.pieces([micro])
    with torch.no_grad(), adapter_disabled(module):
        references = [stage.score(piece.rollouts, module) for piece in pieces]
    for piece, reference in zip(pieces, references, strict=True):
        scored = stage.score(piece.rollouts, module)
        (scored.logprobs - stage.kl(scored, reference)).mean().backward()


def plan(config: RunConfig, scale: Scale, kinds: Kinds) -> dict[str, int]:
    """Bytes on the device at the peak of each phase, as `duet plan` counts them: of the parts
    that are built at scale, without what no allocator sees.
    """
    step = step_of(config, scale, 1, Datasets(kinds, kinds))
    subject = step.subject
    parts = ("vision_language_encoder",) if config.stage == "ar" else DECODER_PARTS
    masters = 4 * trained_parameters(subject)
    weights = masters + sum(weight_bytes(subject, part) for part in parts)
    sampling = [step.tokens] if config.stage == "ar" else [step.latents, step.pixels, step.source]
    return {
        "rollout": weights + max(max(work.peaks) for work in sampling if work),
        "replay": weights + sum(step.rescore.held.values()),
        "update": weights + masters + sum(step.update.held.values()),
    }


def _timed(device: torch.device, name: str, planned: dict[str, int], work: Callable):
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    print(f"  {name}: {seconds:.1f} seconds, {_memory(device, planned[name])}", flush=True)
    return result


def _memory(device: torch.device, planned: int) -> str:
    told = f"planned {planned / GIB:.2f} GiB"
    if device.type != "cuda":
        return told
    peak = torch.cuda.max_memory_allocated(device)
    return f"peak {peak / GIB:.2f} GiB, {told}: {planned / peak - 1:+.1%}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(PARTS)}; all if none")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--group", type=int, default=8, help="samples of the group")
    parser.add_argument("--sources", type=int, default=0, help="pictures that it is an edit of")
    parser.add_argument("--small", action="store_true", help="few and narrow layers")
    options = parser.parse_args(arguments)
    unknown = set(options.stages) - set(PARTS)
    if unknown:
        parser.error(f"unknown stage {sorted(unknown)}: allowed are {', '.join(PARTS)}")
    for name in options.stages or PARTS:
        scale = SMALL if options.small else REAL
        measure(name, scale, pick_device(options.device), options.group, options.sources)


if __name__ == "__main__":
    exit_on_user_error(main)
