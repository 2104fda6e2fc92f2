"""Rewards by built-in name, by entry point, or by dotted path."""

import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points

from configs.errors import UserError
from configs.schema import RewardConfig
from rewards.base import Reward

ENTRY_POINT_GROUP = "duet.rewards"
BUILT_IN = {
    "aesthetic": "rewards.aesthetic.Aesthetic",
    "alignment": "rewards.alignment.Alignment",
    "fidelity": "rewards.fidelity.Fidelity",
    "ocr": "rewards.ocr.Ocr",
}


def load_reward(config: RewardConfig) -> Reward:
    """Import and build one reward.

    Raises UserError for an unknown name, a path that cannot be imported, or
    arguments that the reward does not take.
    """
    factory = _find(config.name)
    try:
        return factory(**config.args)
    except UserError:
        raise
    except Exception as error:  # a plug-in's constructor may raise anything
        raise UserError(
            f"reward {config.name!r} cannot be built with args {config.args}: "
            f"{type(error).__name__}: {error}"
        ) from error


def load_rewards(configs: Iterable[RewardConfig]) -> dict[str, Reward]:
    """Rewards by the last part of their names, in the config's order."""
    return {short_name(c.name): load_reward(c) for c in configs}


def short_name(name: str) -> str:
    """What metrics call a reward: `package.module.Sharp` is `Sharp`."""
    return name.rpartition(".")[2]


def _find(name: str):
    installed = {e.name: e for e in entry_points(group=ENTRY_POINT_GROUP)}
    if name in installed:
        return installed[name].load()
    path = BUILT_IN.get(name, name)
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        known = ", ".join([*BUILT_IN, *installed])
        raise UserError(
            f"reward {name!r} is unknown: allowed are {known}, or a path package.module.Class"
        )
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward {name!r} cannot be imported: {error}") from error
