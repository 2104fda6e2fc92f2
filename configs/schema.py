"""Every setting of a run, with its range. Imports no torch.

Option names are TRL's (GRPOConfig) where TRL has the option.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from duet.configs.errors import UserError


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} = {value!r} is out of range: allowed is {allowed}")


@dataclass(frozen=True)
class ModelConfig:
    path: str  # a local folder or a hub id, in the layout of GlmImagePipeline
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"


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
class DataConfig:
    train: str  # JSONL rows: prompt, and what the rewards read (text, image, ...)
    eval: str


@dataclass(frozen=True)
class SamplingConfig:
    height: int = 1024  # pixels
    width: int = 1024
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    num_inference_steps: int = 50
    guidance_scale: float = 1.5

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            side = getattr(self, name)
            _require(side > 0 and side % 32 == 0, f"sampling.{name}", side, "a multiple of 32")
        _require(self.temperature >= 0, "sampling.temperature", self.temperature, ">= 0")
        _require(self.top_k >= 0, "sampling.top_k", self.top_k, ">= 0 (0 keeps all)")
        _require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "0 < top_p <= 1")
        steps = self.num_inference_steps
        _require(1 <= steps <= 999, "sampling.num_inference_steps", steps, "1 to 999")
        _require(self.guidance_scale >= 0, "sampling.guidance_scale", self.guidance_scale, ">= 0")


@dataclass(frozen=True)
class RolloutConfig:
    num_generations: int = 8  # samples in a group
    prompts_per_step: int = 8  # groups in a rollout, over all processes
    batch_size: int = 16  # samples the engine runs at once, on one process

    def __post_init__(self) -> None:
        _require(self.num_generations >= 2, "rollout.num_generations", self.num_generations, ">= 2")
        for name in ("prompts_per_step", "batch_size"):
            _require(getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), ">= 1")


@dataclass(frozen=True)
class SdeConfig:
    """Which denoising steps of a decoder rollout are actions, and how they are noised."""

    kind: Literal["flow_sde", "cps"] = "flow_sde"
    noise_level: float = 0.7  # a of Flow-SDE, eta of CPS
    window_size: int = 2  # steps with noise; the others follow the ODE
    window_start_max: int = 0  # the window's first step is drawn from 0..this, once a rollout

    def __post_init__(self) -> None:
        _require(self.noise_level >= 0, "sde.noise_level", self.noise_level, ">= 0")
        if self.kind == "cps":
            _require(self.noise_level <= 1, "sde.noise_level", self.noise_level, "0 to 1 for cps")
        _require(self.window_size >= 1, "sde.window_size", self.window_size, ">= 1")
        _require(self.window_start_max >= 0, "sde.window_start_max", self.window_start_max, ">= 0")


@dataclass(frozen=True)
class GrpoConfig:
    epsilon: float = 0.2  # the ratio is clipped below 1 - epsilon
    epsilon_high: float | None = None  # and above 1 + epsilon_high (default: epsilon)
    beta: float = 0.0  # weight of the KL to the reference (adapter off)
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"  # sequence: GSPO
    scale_rewards: bool = True  # divide by the group's standard deviation
    multi_objective_aggregation: Literal["normalize_then_sum", "sum_then_normalize"] = (
        "normalize_then_sum"
    )
    num_iterations: int = 1  # passes over one rollout
    # whose log-probs the ratio starts from. sampler: as recorded, no extra pass; trainer: the
    # training forward's own, so that the ratio starts at exactly 1. auto: sampler in float32,
    # where the two agree to rounding; trainer in low precision, where they part by nats
    old_logprobs: Literal["auto", "sampler", "trainer"] = "auto"
    importance_sampling_cap: float = 2.0  # of trainer over sampler (truncated importance weight)

    def __post_init__(self) -> None:
        _require(0 < self.epsilon < 1, "grpo.epsilon", self.epsilon, "0 < epsilon < 1")
        high = self.epsilon_high
        _require(high is None or high > 0, "grpo.epsilon_high", high, "> 0")
        _require(self.beta >= 0, "grpo.beta", self.beta, ">= 0")
        _require(self.num_iterations >= 1, "grpo.num_iterations", self.num_iterations, ">= 1")
        cap = self.importance_sampling_cap
        _require(cap >= 1, "grpo.importance_sampling_cap", cap, ">= 1")


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 32
    alpha: float = 64.0
    target_modules: tuple[str, ...] = ()  # empty: attention and MLP of the trained module

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", self.rank, ">= 1")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "> 0")


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    lr_scheduler_type: Literal["constant", "linear"] = "constant"  # linear: to 0 at the last step
    warmup_steps: int = 0  # optimizer updates
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8  # samples in one backward pass
    gradient_accumulation_steps: int = 1

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optim.learning_rate", self.learning_rate, "> 0")
        for name in ("weight_decay", "warmup_steps"):
            _require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), ">= 0")
        for name in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "0 to 1")
        _require(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "> 0")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            _require(getattr(self, name) >= 1, f"optim.{name}", getattr(self, name), ">= 1")


@dataclass(frozen=True)
class RewardConfig:
    name: str  # a built-in name, an entry point's name, or package.module.Class
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    view: Literal["full", "low", "high"] = "full"  # whole, an eighth of its sides, four crops
    label: str = ""  # what metrics call it; needed to have one reward twice

    @property
    def metric_name(self) -> str:
        """`package.module.Sharp` is `Sharp`; another view than `full` is told."""
        short = self.name.rpartition(".")[2]
        return self.label or (short if self.view == "full" else f"{short}_{self.view}")


def _require_names_once(name: str, rewards: Sequence[RewardConfig], allowed: str) -> None:
    names = [r.metric_name for r in rewards]
    _require(len(set(names)) == len(names), name, names, allowed)


@dataclass(frozen=True)
class TrainConfig:
    max_steps: int = 100  # rollouts
    save_steps: int = 50
    logging_images_steps: int = 10  # a grid of the rollout's images this often
    resume: str | None = None  # "latest" or a checkpoint folder
    max_not_scored: float = 0.5  # a step in which a reward leaves out a larger share ends the run
    max_skipped: int = 3  # updates in a row that are not finite, and so skipped, end the run
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_steps", "save_steps", "logging_images_steps", "max_skipped"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), ">= 1")
        share = self.max_not_scored
        _require(0 <= share <= 1, "train.max_not_scored", share, "0 to 1")


@dataclass(frozen=True)
class EvalConfig:
    rewards: tuple[RewardConfig, ...] = ()  # measured besides the trained ones
    images_per_prompt: int = 1
    bootstrap_samples: int = 2000
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name in ("images_per_prompt", "bootstrap_samples"):
            _require(getattr(self, name) >= 1, f"eval.{name}", getattr(self, name), ">= 1")
        _require(0 < self.confidence < 1, "eval.confidence", self.confidence, "between 0 and 1")


@dataclass(frozen=True)
class WatchConfig:
    """Rewards that are measured on every rollout and never trained on."""

    rewards: tuple[RewardConfig, ...] = ()
    window: int = 5  # the means of the first and the last steps are compared
    drop: float = 0.05  # share of its first mean that a watched reward may lose
    stop: bool = False  # end the run with a checkpoint when the alarm rings

    def __post_init__(self) -> None:
        _require(self.window >= 1, "watch.window", self.window, ">= 1")
        _require(self.drop > 0, "watch.drop", self.drop, "> 0")
        _require_names_once("watch.rewards", self.rewards, "every name once")
        _require(
            bool(self.rewards) or not self.stop, "watch.stop", True, "false without watch.rewards"
        )


@dataclass(frozen=True)
class RunConfig:
    stage: Literal["ar", "decoder"]
    model: ModelConfig
    data: DataConfig
    rewards: tuple[RewardConfig, ...]
    output_dir: str
    seed: int = 0
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    sde: SdeConfig = SdeConfig()
    grpo: GrpoConfig = GrpoConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    watch: WatchConfig = WatchConfig()

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic(self.model.dtype, self.train.mixed_precision)

    @property
    def old_logprobs_of(self) -> str:
        """`sampler` or `trainer`: what `grpo.old_logprobs` comes to."""
        if self.grpo.old_logprobs != "auto":
            return self.grpo.old_logprobs
        return "sampler" if self.arithmetic.precision == "float32" else "trainer"

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
        _require(len(self.rewards) > 0, "rewards", [], "at least one reward")
        _require_names_once("rewards", self.rewards, "every name once: give a label")
        _require_names_once(
            "rewards and eval.rewards",
            (*self.rewards, *self.eval.rewards),
            "every name once: an evaluation has the trained rewards anyway; give others a label",
        )
        trained = any(reward.weight != 0 for reward in self.rewards)
        _require(trained, "rewards' weights", 0, "at least one that is not 0, to train on")
        if self.stage == "ar":
            top_k = self.sampling.top_k
            _require(top_k != 1, "sampling.top_k", top_k, "0 or >= 2 to train the AR")
            temperature = self.sampling.temperature
            _require(temperature > 0, "sampling.temperature", temperature, "> 0 to train the AR")
        else:
            _require(self.sde.noise_level > 0, "sde.noise_level", self.sde.noise_level, "> 0")
            last = self.sde.window_start_max + self.sde.window_size
            steps = self.sampling.num_inference_steps
            allowed = (
                f"at most num_inference_steps - 1 = {steps - 1}: the last step follows the ODE"
            )
            _require(last < steps, "sde.window_start_max + sde.window_size", last, allowed)
