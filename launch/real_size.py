"""GLM-Image at its real size with random weights: does replay equal sampling there?

    python -m duet.launch.real_size [ar] [decoder] [--device cuda] [--small]

Runs the settings of `configs/glm_image/`: for the AR a group of 8 over a full 1024 px grid,
for the decoder a window of two SDE steps. Prints the gap between sampler and training
forward, what the gate says of it, seconds and peak memory. One part is built at a time: at
real size each needs a GPU with 80 GB. `--small` builds few and narrow layers and small
pictures, for a CPU.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import GlmImagePipeline, GlmImageTransformer2DModel
from PIL import Image
from transformers import (
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from duet.configs.errors import UserError, exit_on_user_error
from duet.configs.load import load_config
from duet.inference.adapters import add_adapter
from duet.inference.engine import Engine
from duet.inference.model import freeze, load_pipeline, pick_device
from duet.inference.parts import PARTS
from duet.inference.request import Request
from duet.inference.rollout import Rollout
from duet.train import gate
from duet.train.gap import Gap
from duet.train.stages import STAGES, Stage, sampled_logprobs
from duet.train.tiny.gaps import walk
from duet.train.update import rescore

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_CODEBOOK = 16384
_PROMPT = 'a red card with a blue circle on the left and the white word "CAT"'


@dataclass(frozen=True)
class Scale:
    """Layers and widths; everything else is the checkpoint's."""

    ar_layers: int = 40
    ar_hidden: int = 4096
    ar_heads: int = 32
    dit_layers: int = 30
    dit_heads: int = 32  # of width 128
    glyph_width: int = 1472
    side_pixels: int = 1024


SMALL = Scale(4, 256, 4, 3, 2, 64, 96)


def build_ar(scale: Scale, tiny: GlmImageForConditionalGeneration):
    """The released AR's shape; the tiny model's token ids, and a vision tower of one layer."""
    config = GlmImageConfig(
        text_config={
            "vocab_size": 168064,
            "hidden_size": scale.ar_hidden,
            "intermediate_size": scale.ar_hidden * 13696 // 4096,
            "num_hidden_layers": scale.ar_layers,
            "num_attention_heads": scale.ar_heads,
            "num_key_value_heads": 2,
            "pad_token_id": tiny.config.text_config.pad_token_id,
            "eos_token_id": _CODEBOOK + 1,
            "vision_vocab_size": 16512,
        },
        vision_config={"depth": 1},
        vq_config={"num_embeddings": _CODEBOOK},
    )
    return GlmImageForConditionalGeneration(config)


def build_dit(scale: Scale) -> GlmImageTransformer2DModel:
    return GlmImageTransformer2DModel(
        num_layers=scale.dit_layers,
        num_attention_heads=scale.dit_heads,
        attention_head_dim=128,
        text_embed_dim=scale.glyph_width,
        time_embed_dim=512,
        prior_vq_quantizer_codebook_size=_CODEBOOK,
    )


def build_glyph_encoder(scale: Scale) -> T5EncoderModel:
    """ByT5-small's shape."""
    return T5EncoderModel(
        T5Config(
            vocab_size=384,
            d_model=scale.glyph_width,
            d_kv=64,
            d_ff=scale.glyph_width * 3584 // 1472,
            num_layers=12,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )


def build_pipeline(stage: str, scale: Scale, device: torch.device) -> GlmImagePipeline:
    """The stage's own part at scale, bfloat16, random; what it does not run stays tiny."""
    pipeline = load_pipeline(str(_CONFIGS / "tiny" / "model"), "bfloat16", device.type)
    torch.manual_seed(0)
    tiny = pipeline.vision_language_encoder
    builders = {
        "ar": {"vision_language_encoder": lambda: build_ar(scale, tiny)},
        "decoder": {
            "transformer": lambda: build_dit(scale),
            "text_encoder": lambda: build_glyph_encoder(scale),
        },
    }[stage]
    pipeline.register_modules(**{n: _at_scale(build, device) for n, build in builders.items()})
    return freeze(pipeline)


def _at_scale(build: Callable[[], torch.nn.Module], device: torch.device) -> torch.nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return build()
    finally:
        torch.set_default_dtype(before)


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


def measure(name: str, scale: Scale, device: torch.device) -> None:
    side = scale.side_pixels
    size = [f"sampling.height={side}", f"sampling.width={side}"]
    config = load_config(_CONFIGS / "glm_image" / f"{name}.yaml", size)
    pipeline = build_pipeline(name, scale, device)
    part, lora = PARTS[name], config.lora
    module = part.module(pipeline)
    add_adapter(module, part, lora.rank, lora.alpha, lora.target_modules)
    walk(module, config.optim.learning_rate)
    stage = STAGES[name](Engine.of(pipeline, config), config)
    parameters = sum(p.numel() for p in module.parameters())
    print(f"{name}: {parameters / 1e9:.2f} B parameters on {device}, {side} x {side} pixels")
    noise = stage.engine.initial_noise(0, stage.size)
    request = Request(_PROMPT, tuple(range(8)), stage.size, noise=noise)
    with torch.no_grad():
        rollout = _timed(device, "rollout", lambda: ROLLOUTS[name](stage, request))
    batch = config.optim.per_device_train_batch_size
    again = _timed(device, "replay", lambda: rescore(stage, module, [rollout], batch))
    print(f"  {Gap.of(again, sampled_logprobs(stage, [rollout], again.device))}")
    try:
        gate.check_gap(stage, [rollout], again, config.arithmetic.precision)
        print("  the gate passes")
    except UserError as error:
        print(f"  {error}")


def _timed(device: torch.device, name: str, work: Callable):
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize(device)
    peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if on_gpu else ""
    print(f"  {name}: {time.perf_counter() - start:.1f} seconds{peak}", flush=True)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(PARTS)}; all if none")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--small", action="store_true", help="few and narrow layers")
    options = parser.parse_args(arguments)
    unknown = set(options.stages) - set(PARTS)
    if unknown:
        parser.error(f"unknown stage {sorted(unknown)}: allowed are {', '.join(PARTS)}")
    for name in options.stages or PARTS:
        measure(name, SMALL if options.small else Scale(), pick_device(options.device))


if __name__ == "__main__":
    exit_on_user_error(main)
