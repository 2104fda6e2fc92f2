"""Settings of the updates: the objective, the optimizer and the weights' moving average. Imports no
torch.
"""

from dataclasses import dataclass
from typing import Literal

from duet.configs.setting import MANY, Section, require, setting


@dataclass(frozen=True)
class GrpoConfig(Section):
    title = "grpo"

    epsilon: float = setting("the ratio is clipped below 1 - epsilon", 0.2, above=0, below=1)
    epsilon_high: float | None = setting(
        "and above 1 + epsilon_high; null: epsilon", None, above=0, most=MANY
    )
    beta: float = setting(
        "weight of the KL to the reference, the weights that the run began with",
        0.0,
        least=0,
        most=1e6,
    )
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = setting("how actions are averaged", "grpo")
    importance_sampling_level: Literal["token", "sequence"] = setting("sequence: GSPO", "token")
    scale_rewards: Literal["group", "batch", "none", True, False] = setting(
        "divide by the standard deviation of each group, of the whole rollout (with "
        "normalize_then_sum of the groups' sums: GDPO's last step), or not at all; true is "
        "group, false none",
        "group",
    )
    multi_objective_aggregation: Literal["normalize_then_sum", "sum_then_normalize"] = setting(
        "rewards are scaled before they are summed (GDPO) or after", "normalize_then_sum"
    )
    num_iterations: int = setting("passes over one rollout", 1, least=1, most=1000)
    old_logprobs: Literal["auto", "sampler", "trainer"] = setting(
        "whose log-probs the ratio starts from. sampler: as recorded, no extra pass; trainer: the "
        "training forward's own. auto: sampler in float32, where the two agree to rounding; "
        "trainer in low precision, where they part by nats",
        "auto",
    )
    importance_sampling_cap: float = setting(
        "of the weight trainer / sampler, where old_logprobs is trainer", 2.0, least=1, most=MANY
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        named = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        object.__setattr__(self, "scale_rewards", named)  # as TRL reads its booleans


@dataclass(frozen=True)
class AverageConfig(Section):
    """Exponential moving average of the trained weights, as diffusers' EMAModel takes it."""

    title = "average"

    decay: float = setting(
        "share that the average keeps in an update, once it is warm: in the n-th update after "
        "`start` it keeps n / (9 + n) at most, in the first one nothing",
        0.99,
        above=0,
        below=1,
    )
    start: int = setting(
        "updates before it begins; until then it is the weights", 0, least=0, most=MANY
    )


@dataclass(frozen=True)
class OptimConfig(Section):
    title = "optim"

    learning_rate: float = setting("AdamW's", 1e-4, above=0, most=1e4)
    weight_decay: float = setting("AdamW's", 0.0, least=0, most=100)
    adam_beta1: float = setting("decay of the gradient's mean", 0.9, least=0, below=1)
    adam_beta2: float = setting("decay of the gradient's square", 0.999, least=0, below=1)
    adam_epsilon: float = setting(
        "well below the gradients' root mean square, or it shrinks the steps", 1e-8, above=0, most=1
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = setting(
        "after the warm-up; linear and cosine fall to 0 at the last update", "constant"
    )
    warmup_steps: int = setting(
        "updates in which the learning rate rises from 0", 0, least=0, most=MANY
    )
    warmup_ratio: float = setting("the same as a share of all updates", 0.0, least=0, below=1)
    max_grad_norm: float = setting("a longer gradient is clipped", 1.0, above=0, most=1e9)
    per_device_train_batch_size: int = setting(
        "samples in one backward pass", 8, least=1, most=MANY
    )
    gradient_accumulation_steps: int = setting(
        "backward passes in an update", 1, least=1, most=MANY
    )
    gradient_checkpointing: bool = setting(
        "blocks keep their inputs alone and are computed again in backward", False
    )
    steps_per_backward: int = setting(
        "decoder: SDE steps in one backward pass; 0: the window at once", 0, least=0, most=998
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.warmup_steps > 0 and self.warmup_ratio > 0
        allowed = f"0 where optim.warmup_steps = {self.warmup_steps}: give one of the two"
        require(not both, "optim.warmup_ratio", self.warmup_ratio, allowed)
