"""Rewards by built-in name, by entry point, or by dotted path."""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.rewards.base import Reward
from duet.rewards.view import Viewed

T = TypeVar("T")
ENTRY_POINT_GROUP = "duet.rewards"
BUILT_IN = {
    "aesthetic": "duet.rewards.aesthetic.Aesthetic",
    "alignment": "duet.rewards.alignment.Alignment",
    "brisque": "duet.rewards.brisque.Brisque",
    "diversity": "duet.rewards.diversity.Diversity",
    "edit_direction": "duet.rewards.edit_direction.EditDirection",
    "fidelity": "duet.rewards.fidelity.Fidelity",
    "hpsv2": "duet.rewards.hpsv2.HpsV2",
    "identity": "duet.rewards.identity.Identity",
    "judge": "duet.rewards.judge.Judge",
    "ocr": "duet.rewards.ocr.Ocr",
    "pickscore": "duet.rewards.pickscore.PickScore",
    "pyiqa": "duet.rewards.pyiqa.PyIqa",
    "remote": "duet.rewards.service.remote.Remote",
    "source_consistency": "duet.rewards.source_consistency.SourceConsistency",
    "style": "duet.rewards.style.Style",
}


def load_reward(config: RewardConfig) -> Reward:
    """Import and build one reward, without its weights.

    Raises UserError for an unknown name, a path that cannot be imported, or
    arguments that the reward does not take.
    """
    factory = _find(config.name)
    try:
        reward = factory(**config.args)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a plug-in's constructor may raise anything
        raise UserError(
            f"reward {config.name!r} cannot be built with args {config.args}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(reward):
        raise UserError(f"reward {config.name!r} makes a {type(reward).__name__}: nothing to call")
    return reward if config.view == "full" else Viewed(reward, config.view)


def load_rewards(configs: Iterable[RewardConfig]) -> dict[str, Reward]:
    """Rewards with their weights by the name that metrics call them, in the config's order."""
    rewards = {config.metric_name: load_reward(config) for config in configs}
    load_weights(rewards)
    return rewards


def load_weights(rewards: Mapping[str, Reward]) -> None:
    """Let every reward that has weights read them. Raises UserError, with the reward's name."""
    for name, reward in rewards.items():
        try:
            getattr(reward, "load", lambda: None)()
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # a plug-in's own reading may raise anything
            raise UserError(
                f"reward {name!r} cannot load its weights: {type(error).__name__}: {error}"
            ) from error


def _find(name: str) -> Callable[..., Reward]:
    installed = {e.name: e for e in entry_points(group=ENTRY_POINT_GROUP)}
    if name in installed:
        point = installed[name]
        return _imported(f"{name!r} of entry point {point.value!r}", point.module, point.load)
    path = BUILT_IN.get(name, name)
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        known = ", ".join([*BUILT_IN, *installed])
        raise UserError(
            f"reward {name!r} is unknown: allowed are {known}, or a path package.module.Class"
        )
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # behind what is installed, however Duet was started
    return _imported(
        repr(name), module_name, lambda: getattr(importlib.import_module(module_name), attribute)
    )


def _imported(what: str, module: str, load: Callable[[], T]) -> T:
    """Raises UserError, in one line, for all that an import may raise."""
    try:
        return load()
    except ModuleNotFoundError as error:
        own = error.name is not None and f"{module}.".startswith(f"{error.name}.")
        why = f"there is no module {error.name!r}" if own else f"its import of {error.name!r} fails"
        raise UserError(f"reward {what} cannot be imported: {why}: {error}") from error
    except (Exception, SystemExit) as error:  # a plug-in's module may raise anything
        raise UserError(
            f"reward {what} cannot be imported: {type(error).__name__}: {error}"
        ) from error
