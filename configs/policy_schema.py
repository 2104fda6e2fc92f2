"""Settings of the policy, which sampling and training share: the model, what its forwards run in,
its adapter, and how it is sampled. Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal

from duet.configs.setting import MANY, Section, require, setting


@dataclass(frozen=True)
class ModelConfig(Section):
    title = "model"

    path: str = setting("a local folder or a hub id, in the layout of GlmImagePipeline")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("of the frozen weights", "float32")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto: a GPU where there is one, unless by --accelerate cpu", "auto"
    )
    offload: Literal["none", "phase"] = setting(
        "phase: parts and reward models that a phase does not need wait on the CPU (over several "
        "processes without what is trained)",
        "none",
    )
    adapters: tuple[str, ...] = setting(
        "checkpoints to begin with, adapters or full weights of either part: a trained part goes "
        "on from its own, with a fresh optimizer",
        (),
    )


@dataclass(frozen=True)
class Arithmetic:
    """What forward passes run in: a policy is its weights and their arithmetic."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen weights
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"

    @property
    def precision(self) -> str:
        """The coarsest dtype that weights or products are rounded to."""
        rounded = self.dtype, AUTOCAST.get(self.mixed_precision, self.dtype)
        return max(rounded, key=("float32", "float16", "bfloat16").index)


AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class LoraConfig(Section):
    title = "lora"

    rank: int = setting("of each layer's update", 32, least=1, most=65_536)
    alpha: float = setting("the update is scaled by alpha / rank", 64.0, above=0, most=MANY)
    dropout: float = setting(
        "of the adapter's inputs in an update; sampling and old log-probs know none: the ratio "
        "is off 1 by it",
        0.0,
        least=0,
        below=1,
    )
    target_modules: tuple[str, ...] = setting(
        "names of layers; empty: attention and MLP of the trained module", ()
    )


@dataclass(frozen=True)
class SamplingConfig(Section):
    title = "sampling"

    height: int = setting("pixels", 1024, least=32, most=8192, multiple_of=32)
    width: int = setting("pixels", 1024, least=32, most=8192, multiple_of=32)
    temperature: float = setting("of the AR; 0 takes the best token", 1.0, least=0, most=100)
    top_k: int = setting("tokens to draw from; 0: all", 0, least=0, most=MANY)
    top_p: float = setting("probability of the tokens to draw from", 1.0, above=0, most=1)
    num_inference_steps: int = setting("denoising steps", 50, least=1, most=999)
    guidance_scale: float = setting("above 1 two forwards a step", 1.5, least=0, most=100)


@dataclass(frozen=True)
class SdeConfig(Section):
    """Which denoising steps of a decoder rollout are actions, and how they are noised."""

    title = "sde"

    kind: Literal["flow_sde", "cps"] = setting("how a step is noised", "flow_sde")
    noise_level: float = setting("a of Flow-SDE, eta of CPS (at most 1)", 0.7, least=0, most=100)
    window_size: int = setting("steps with noise; the others follow the ODE", 2, least=1, most=998)
    window_start_max: int = setting(
        "the window's first step is drawn from 0 to this, once a rollout", 0, least=0, most=998
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.kind != "cps" or self.noise_level <= 1
        require(fits, "sde.noise_level", self.noise_level, "0 to 1 for cps")
