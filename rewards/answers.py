"""What a reward may answer: a float, NaN where it failed, None where it does not apply."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

Answer = float | None
LARGEST = 1e18  # its square, which a standard deviation needs, must fit float32
_COUNTS = 1e-4  # a group's spread below it moves no advantage (TRL's guard in the denominator)
_BLUR = 0.1  # share of a group's spread that rounding to float32 may move an answer


class BadAnswer(ValueError):
    """Not what a reward may answer; the message goes on from the reward's name."""


def read_answers(answers: Any, count: int) -> list[Answer]:
    """One a sample, as Python floats and None. Raises BadAnswer for anything else."""
    if isinstance(answers, str | bytes | dict | set):
        raise BadAnswer(f"answered a {type(answers).__name__}: return a list of one float a sample")
    try:
        answers = list(answers)
    except TypeError as error:
        raise BadAnswer(
            f"answered {_short(answers)}: return a list of one float a sample"
        ) from error
    if len(answers) != count:
        raise BadAnswer(
            f"answered {len(answers)} scores for {count} samples: return one float a sample, "
            "NaN where it cannot be scored, None where the reward does not apply"
        )
    return [_read(value, index) for index, value in enumerate(answers)]


def require_apart(answers: Sequence[Answer]) -> None:
    """Raises BadAnswer where the spread of a group is lost in float32, which training holds."""
    scored = np.array([a for a in answers if a is not None and not math.isnan(a)])
    spread = float(np.std(scored)) if len(scored) else 0.0
    moved = np.abs(scored - scored.astype(np.float32)).max(initial=0.0)
    if spread > _COUNTS and moved > _BLUR * spread:
        low, high = float(scored.min()), float(scored.max())
        raise BadAnswer(
            f"answered {low!r} to {high!r} for one prompt, which float32 does not hold apart: "
            "subtract what they have in common"
        )


def _read(value: Any, index: int) -> Answer:
    if value is None:
        return None
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # of numpy or torch
    if not isinstance(value, Real):
        raise BadAnswer(
            f"answered {_short(value)} for sample {index}, which is no float: return a float, "
            "NaN where it cannot be scored, None where the reward does not apply"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if abs(number) > LARGEST:
        raise BadAnswer(
            f"answered {_short(value)} for sample {index}: return a finite float of at most "
            f"{LARGEST:g}, or NaN where it cannot be scored"
        )
    return number


def _short(value: Any) -> str:
    if isinstance(value, Real):
        return f"{value!r:.40}"
    shape = getattr(value, "shape", ())
    told = f"of shape {tuple(shape)}" if shape else f"{value!r:.40}"
    return f"a {type(value).__name__} {told}"
