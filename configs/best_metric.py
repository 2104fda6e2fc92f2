"""What `best` goes by: a figure of the held-out prompts."""

from dataclasses import dataclass

from duet.configs.reward_schema import RewardConfig
from duet.configs.schema import RunConfig
from duet.configs.setting import require
from duet.configs.turns import trained_rewards

SUM = "reward"  # what training maximises, of all turns together


@dataclass(frozen=True)
class BestMetric:
    key: str  # as an evaluation logs it
    less_is_better: bool


def held_out_rewards(config: RunConfig) -> tuple[RewardConfig, ...]:
    """What held-out pictures are measured by. Raises UserError as `trained_rewards`."""
    return (*trained_rewards(config), *config.eval.rewards)


def best_metric(config: RunConfig) -> BestMetric:
    """Raises UserError for a name that no held-out reward has."""
    asked, known = config.train.metric_for_best_model, held_out_rewards(config)
    names = [SUM, *(reward.metric_name for reward in known)]
    require(asked in names, "train.metric_for_best_model", asked, f"one of {', '.join(names)}")
    if asked == SUM:
        return BestMetric("eval/reward", less_is_better=False)
    weight = next(reward.weight for reward in known if reward.metric_name == asked)
    return BestMetric(f"eval/rewards/{asked}/mean", less_is_better=weight < 0)
