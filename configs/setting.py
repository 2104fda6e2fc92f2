"""A setting's default, range and meaning, said once: for the checks, the errors and the list."""

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

from duet.configs.errors import UserError

MANY = 1_000_000  # steps, samples: more than anybody waits for
_LONGEST = 80  # characters of a value in an error line


@dataclass(frozen=True)
class Range:
    """What a setting's value is held to; None: no end on that side."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    multiple_of: int | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        """As `0 < x <= 1`, `32 to 8,192, a multiple of 32`, "" where all is allowed."""
        low = _number(self.least if self.above is None else self.above)
        high = _number(self.most if self.below is None else self.below)
        if self.above is None and self.below is None:
            told = f"{low} to {high}" if low and high else f">= {low}" * bool(low)
        else:
            left = low and f"{low} {'<' if self.least is None else '<='} "
            right = high and f" {'<' if self.most is None else '<='} {high}"
            told = f"{left}x{right}"
        return told + (f", a multiple of {self.multiple_of}" if self.multiple_of else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def setting(meaning: str, default: Any = MISSING, **ends: Any) -> Any:
    """A field of a `Section`; `ends` are those of `Range`. Without a default it is required."""
    made = {"default_factory": dict} if default == {} else {"default": default}
    return field(**made, metadata={"meaning": meaning, "range": Range(**ends)})


class Section:
    """A frozen dataclass of settings. A value out of its range is refused, however it came."""

    title: ClassVar[str]  # the section's key in the YAML

    def __post_init__(self) -> None:
        for known in fields(self):
            self._check(known, getattr(self, known.name))

    def _check(self, known: Field, value: Any) -> None:
        name, allowed = f"{self.title}.{known.name}".lstrip("."), known.metadata["range"]
        match value:
            case bool() | None:
                pass
            case int() | float():
                finite = isinstance(value, int) or math.isfinite(value)
                require(finite and value in allowed, name, value, str(allowed))
            case str():
                require(bool(value.strip()) or known.default == "", name, value, "text, not empty")
            case tuple() if all(isinstance(part, str) for part in value):
                once = len(set(value)) == len(value) and all(part.strip() for part in value)
                require(once, name, list(value), "every name once, none empty")


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raises UserError: `name = value` is out of range."""
    if not holds:
        raise UserError(f"{name} = {shown(value)} is out of range: allowed is {allowed}")


def shown(value: object) -> str:
    """A value for an error line: its repr, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python prints no larger ones
        return f"an integer of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"
