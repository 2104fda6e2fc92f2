"""Every setting of a run: its default, range and meaning (`duet settings` lists them).

Option names and meanings are TRL's (GRPOConfig) and transformers' where they have the option.
Upper ends are far beyond honest use: they catch a slip of the hand. Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal

from duet.configs.errors import UserError
from duet.configs.policy_schema import (
    Arithmetic,
    LoraConfig,
    ModelConfig,
    SamplingConfig,
    SdeConfig,
)
from duet.configs.reward_schema import RewardConfig, require_names_once
from duet.configs.setting import MANY, Section, require, setting
from duet.configs.update_schema import AverageConfig, GrpoConfig, OptimConfig


@dataclass(frozen=True)
class DataConfig(Section):
    title = "data"

    train: str = setting(
        "a file, a folder or a hub id: prompt, and what rewards read (text, image, ...)"
    )
    eval: str = setting("the same, of the held-out prompts")
    train_name: str | None = setting("a configuration of the dataset, where it has several", None)
    eval_name: str | None = setting("a configuration of the dataset, where it has several", None)
    train_split: str | None = setting("may be left out where there is one", None)
    eval_split: str | None = setting("may be left out where there is one", None)
    train_revision: str | None = setting("a branch, tag or commit of the hub", None)
    eval_revision: str | None = setting("a branch, tag or commit of the hub", None)
    columns: dict[str, str] = setting("our key: the column, of both datasets", {})
    fit: Literal["crop", "refuse"] = setting("a picture of another shape than the run's", "crop")

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = self.columns.items()
        strings = all(isinstance(part, str) and part for pair in pairs for part in pair)
        require(strings, "data.columns", self.columns, "names to names: {prompt: caption}")


@dataclass(frozen=True)
class RolloutConfig(Section):
    title = "rollout"

    num_generations: int = setting("samples in a group", 8, least=2, most=10_000)
    prompts_per_step: int = setting(
        "groups in a rollout, over all processes; where these do not divide, their samples must",
        8,
        least=1,
        most=MANY,
    )
    batch_size: int = setting(
        "samples the engine runs at once, on one process", 16, least=1, most=MANY
    )
    priors: Literal["auto", "sampled", "reference"] = setting(
        "decoder: prior tokens are sampled by the AR, or encoded from the row's image; auto: "
        "encoded where the row has one",
        "auto",
    )
    prior_cache: str | None = setting(
        "decoder: the folder that `duet priors` has filled; the AR's weights are not read then, "
        "unless train.eval_steps needs them. null: priors are made anew in each rollout",
        None,
    )
    priors_per_prompt: int = setting(
        "sampled priors in the cache; epoch by epoch a prompt has its next one",
        4,
        least=1,
        most=10_000,
    )


@dataclass(frozen=True)
class TrainConfig(Section):
    title = "train"

    max_steps: int = setting("rollouts", 100, least=1, most=MANY)
    save_steps: int = setting("a checkpoint so often, and one at the end", 50, least=1, most=MANY)
    save_total_limit: int | None = setting(
        "checkpoints that are kept, the newest ones, the best one and the one resumed from; "
        "null: all",
        None,
        least=1,
        most=MANY,
    )
    eval_steps: int | None = setting(
        "rollouts between evaluations of data.eval by the weights as they stand; null: none",
        None,
        least=1,
        most=MANY,
    )
    metric_for_best_model: str = setting(
        "by it an evaluation's checkpoint is the best, and kept: reward, the trained rewards' "
        "weighted sum, or the name of a reward (with a weight below 0 less is better)",
        "reward",
    )
    logging_images_steps: int = setting(
        "a grid of the rollout's images so often", 10, least=1, most=MANY
    )
    resume: str | None = setting("latest, or a checkpoint folder", None)
    max_not_scored: float = setting(
        "a step in which a reward leaves out a larger share ends the run", 0.5, least=0, most=1
    )
    max_skipped: int = setting(
        "updates in a row that are not finite, and so skipped, end the run", 3, least=1, most=MANY
    )
    ddp_timeout: int = setting(
        "seconds that a process waits for another one before it ends the run",
        1800,
        least=1,
        most=MANY,
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("autocast of every forward", "no")
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = setting(
        "besides metrics.jsonl, which is always written", ()
    )


@dataclass(frozen=True)
class EvalConfig(Section):
    title = "eval"

    rewards: tuple[RewardConfig, ...] = setting("measured besides the trained ones", ())
    images_per_prompt: int = setting("each with its own seed", 1, least=1, most=10_000)
    bootstrap_samples: int = setting("of the intervals", 2000, least=1, most=MANY)
    confidence: float = setting("of the intervals", 0.95, above=0, below=1)


@dataclass(frozen=True)
class WatchConfig(Section):
    """Rewards that are measured on every rollout and never trained on."""

    title = "watch"

    rewards: tuple[RewardConfig, ...] = setting("measured on every rollout, never trained on", ())
    window: int = setting(
        "the means of so many first and last steps are compared", 5, least=1, most=MANY
    )
    drop: float = setting(
        "share of its first mean that a watched reward may lose", 0.05, above=0, most=1000
    )
    stop: bool = setting("end the run with a checkpoint when the alarm rings", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_names_once("watch.rewards", self.rewards, "every name once")


@dataclass(frozen=True)
class TurnConfig(Section):
    """What it leaves out it has from the run's own sections, key by key."""

    title = "stages[]"

    part: Literal["ar", "decoder"] = setting("the part that is trained, once in the list")
    steps: int = setting("rollouts before the next turn", least=1, most=MANY)
    rewards: tuple[RewardConfig, ...] = setting("what is trained on", ())
    sde: SdeConfig = setting("the decoder's noise", SdeConfig())
    grpo: GrpoConfig = setting("the objective", GrpoConfig())
    tuning: Literal["lora", "full"] = setting("as the run's", "lora")
    lora: LoraConfig = setting("the adapter", LoraConfig())
    average: AverageConfig | None = setting("as the run's", None)
    optim: OptimConfig = setting("the updates", OptimConfig())
    watch: WatchConfig = setting("against reward hacking", WatchConfig())


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    title = ""

    stage: Literal["ar", "decoder"] | None = setting("the part that is trained", None)
    stages: tuple[TurnConfig, ...] = setting(
        "instead of stage: turns, walked in order again and again until train.max_steps", ()
    )
    model: ModelConfig = setting("what is trained")
    data: DataConfig = setting("prompts")
    rewards: tuple[RewardConfig, ...] = setting("what is trained on", ())
    output_dir: str = setting("folder of the run")
    seed: int = setting("of prompts, noise and tokens", 0, least=0, most=2**32 - 1)
    sampling: SamplingConfig = setting("how pictures are sampled", SamplingConfig())
    rollout: RolloutConfig = setting("how many", RolloutConfig())
    sde: SdeConfig = setting("the decoder's noise", SdeConfig())
    grpo: GrpoConfig = setting("the objective", GrpoConfig())
    tuning: Literal["lora", "full"] = setting(
        "an adapter, or all weights of the part that its forward passes, in float32", "lora"
    )
    lora: LoraConfig = setting("the adapter; not used by full tuning", LoraConfig())
    average: AverageConfig | None = setting(
        "a moving average beside the trained weights, for --average of evaluate and generate", None
    )
    optim: OptimConfig = setting("the updates", OptimConfig())
    train: TrainConfig = setting("the run", TrainConfig())
    eval: EvalConfig = setting("the evaluation", EvalConfig())
    watch: WatchConfig = setting("against reward hacking", WatchConfig())

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic(self.model.dtype, self.train.mixed_precision)

    @property
    def dropout(self) -> float:
        """Of what is trained."""
        return self.lora.dropout if self.tuning == "lora" else 0.0

    @property
    def old_logprobs_of(self) -> str:
        """`sampler` or `trainer`: what `grpo.old_logprobs` comes to."""
        if self.grpo.old_logprobs != "auto":
            return self.grpo.old_logprobs
        return "sampler" if self.arithmetic.precision == "float32" else "trainer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.stage is None) == (not self.stages):
            raise UserError("give either stage (ar or decoder) or stages (a list of turns)")
        parts = [turn.part for turn in self.stages]
        require(len(set(parts)) == len(parts), "stages", parts, "every part once")
        require(bool(self.stages or self.rewards), "rewards", [], "at least one reward")
        cache = self.rollout.prior_cache
        require(
            "ar" not in parts or cache is None, "rollout.prior_cache", cache, "null with stages"
        )
        require_names_once("rewards", self.rewards, "every name once: give a label")
        require_names_once(
            "rewards and eval.rewards",
            (*self.rewards, *self.eval.rewards),
            "every name once: an evaluation has the trained rewards anyway; give others a label",
        )

    def require_trainable(self) -> None:
        """Raises UserError for sections that do not go together in training.

        An evaluation asks for none of it.
        """
        trained = any(reward.weight != 0 for reward in self.rewards)
        require(trained, "rewards' weights", 0, "at least one that is not 0, to train on")
        watched = bool(self.watch.rewards) or not self.watch.stop
        require(watched, "watch.stop", True, "false without watch.rewards")
        mixed, dtype = self.train.mixed_precision, self.model.dtype
        # the part is float32 then: without autocast it would run in float32 too
        lowered = self.tuning == "lora" or dtype == "float32" or mixed != "no"
        allowed = f"'bf16' or 'fp16' with tuning = 'full' and model.dtype = {dtype!r}"
        require(lowered, "train.mixed_precision", mixed, allowed)
        if self.stage == "ar":
            top_k = self.sampling.top_k
            require(top_k != 1, "sampling.top_k", top_k, "0 or >= 2 to train the AR")
            temperature = self.sampling.temperature
            require(temperature > 0, "sampling.temperature", temperature, "> 0 to train the AR")
            return
        require(self.sde.noise_level > 0, "sde.noise_level", self.sde.noise_level, "> 0")
        last = self.sde.window_start_max + self.sde.window_size
        steps = self.sampling.num_inference_steps
        allowed = f"at most num_inference_steps - 1 = {steps - 1}: the last step follows the ODE"
        require(last < steps, "sde.window_start_max + sde.window_size", last, allowed)
        self._require_steps_per_backward()

    def _require_steps_per_backward(self) -> None:
        at_once, window = self.optim.steps_per_backward, self.sde.window_size
        if not at_once:
            return
        name = "optim.steps_per_backward"
        require(window % at_once == 0, name, at_once, f"a divisor of sde.window_size = {window}")
        whole = at_once == window or self.grpo.importance_sampling_level == "token"
        require(whole, name, at_once, "0 where importance_sampling_level is sequence")
