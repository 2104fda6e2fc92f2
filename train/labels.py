"""What the models of an evaluation are called: in tables, and as folders of a report."""

import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from duet.configs.errors import UserError
from duet.inference.trained import trained_folder
from duet.train.results import BASE, PAGE, RESULTS, SOURCES, STRIP

_LONGEST = 100  # characters, of the 255 bytes that file systems take
_FOREIGN = re.compile(r"^\.|[^A-Za-z0-9_.+=-]")


def labels(models: Sequence[tuple[str, ...]]) -> list[str]:
    """A name a model: its checkpoints' last folders, as many as tell the models apart.

    It is of letters, digits and `_.+=-`, whatever stands in the folders' names; where another
    model, the base or the report has it, it gets a number.
    Raises UserError when a model is given twice.
    """
    apart = [frozenset(trained_folder(c).resolve() for c in model) for model in models]
    if len(set(apart)) < len(apart):
        raise UserError("--checkpoint names one model twice: give every model once")
    paths = [[Path(c).resolve().parts[1:] for c in model] for model in models]
    names: list[str] = []
    for depth in range(2, 1 + max([2, *(len(p) for model in paths for p in model)])):
        names = ["+".join("-".join(p[-depth:]) for p in model) for model in paths]
        if len(set(names)) == len(names):
            break
    taken = {name.casefold() for name in (BASE, RESULTS, PAGE, STRIP, SOURCES)}
    return [_free(_FOREIGN.sub("_", name[-_LONGEST:]), taken) for name in names]


def _free(name: str, taken: set[str]) -> str:
    """Some file systems tell no capitals apart."""
    free, numbers = name, count(2)
    while free.casefold() in taken:
        end = f"-{next(numbers)}"
        free = name[: _LONGEST - len(end)] + end
    taken.add(free.casefold())
    return free
