"""What a reward's entry in a config holds."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from duet.configs.errors import UserError
from duet.configs.setting import Section, require, setting, shown

_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class RewardConfig(Section):
    name: str = setting("a built-in name, an entry point's name, or package.module.Class")
    weight: float = setting("in the sum; below 0: less is better", 1.0, least=-1e6, most=1e6)
    args: dict[str, Any] = setting("of the reward's constructor", {})
    view: Literal["full", "low", "high"] = setting(
        "the picture whole, at an eighth of its sides, or as four crops", "full"
    )
    label: str = setting("what metrics call it; needed to have one reward twice", "")

    @property
    def title(self) -> str:
        return f"reward {shown(self.name)}"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_line = self.label.isprintable() and self.label == self.label.strip()
        require(one_line, f"{self.title}.label", self.label, "text that prints in one line")
        _require_json(f"{self.title}.args", self.args)

    @property
    def metric_name(self) -> str:
        """`package.module.Sharp` is `Sharp`; another view than `full` is told."""
        short = self.name.rpartition(".")[2]
        return self.label or (short if self.view == "full" else f"{short}_{self.view}")


def _require_json(name: str, value: object) -> None:
    """Args go to the checkpoint's and the service's JSON."""
    match value:
        case dict() if all(isinstance(key, str) for key in value):
            for key, part in value.items():
                _require_json(f"{name}.{key}", part)
        case list():
            for i, part in enumerate(value):
                _require_json(f"{name}[{i}]", part)
        case None | bool() | str():
            pass
        case int() | float() if abs(value) <= _LARGEST:  # NaN is not
            pass
        case _:
            raise UserError(
                f"{name} = {shown(value)} is nothing that JSON holds: allowed are text, finite "
                "numbers, true, false, null, lists, and mappings with text as keys"
            )


def require_names_once(name: str, rewards: Sequence[RewardConfig], allowed: str) -> None:
    names = [r.metric_name for r in rewards]
    require(len(set(names)) == len(names), name, names, allowed)
