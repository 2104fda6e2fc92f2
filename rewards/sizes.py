"""What the weights of rewards take on a GPU, told before they are read."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from duet.configs.schema import RewardConfig
from duet.rewards.clip import Clip, tower_bytes
from duet.rewards.registry import load_reward


@dataclass(frozen=True)
class RewardSizes:
    bytes: int
    unknown: tuple[str, ...]  # names of rewards whose weights cannot be told


def reward_sizes(configs: Iterable[RewardConfig]) -> RewardSizes:
    """Of those on the GPU; equal towers share one copy. Raises UserError as `load_reward`."""
    towers: dict[tuple, int | None] = {}
    unknown: list[str] = []
    for config in configs:
        if config.args.get("device") == "cpu":
            continue
        # which GPU does not matter here, nor whether there is one
        args = {k: v for k, v in config.args.items() if k != "device"}
        reward = load_reward(replace(config, view="full", args=args))
        clip = getattr(reward, "clip", None)
        if isinstance(clip, Clip):
            size = towers[clip.model, clip.pretrained, clip.dtype] = tower_bytes(clip)
            if size is None:
                unknown.append(config.metric_name)
        elif hasattr(reward, "device"):
            unknown.append(config.metric_name)
    return RewardSizes(sum(filter(None, towers.values())), tuple(unknown))
