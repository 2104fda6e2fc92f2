"""What an evaluation found: as data, as strict JSON, as a table of text."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from duet.configs.outputs import write_new
from duet.train.statistics import Estimate, Summary

RESULTS, PAGE, STRIP = "results.json", "index.html", "before_after.png"  # beside a folder a model
BASE = "base"  # the name of the model without a checkpoint
SOURCES = "sources"  # the folder of what edits start from


@dataclass(frozen=True)
class ModelResult:
    model: str  # its name in tables and folders
    checkpoints: list[str]
    images: list[str]  # paths below the report's folder, prompt by prompt
    # a reward: [prompts, images]; NaN where not scored, None where it does not apply
    scores: dict[str, list[list[float | None]]]
    metrics: dict[str, Summary]


@dataclass(frozen=True)
class Results:
    stage: str
    confidence: float
    prompts: list[str]
    rows: list[ModelResult]  # the base first
    sources: list[list[str]] = field(default_factory=list)  # of each prompt, paths as above


@dataclass(frozen=True)
class Column:
    """One figure of every model: a reward's mean, or how many pictures it finds perfect."""

    name: str
    cells: list[Estimate]  # a model
    show: Callable[[float], str]
    show_change: Callable[[float], str]


def write_results(results: Results, output: Path) -> None:
    """Write `output/results.json`, strict JSON: null where there is no score."""
    text = json.dumps(_plain(asdict(results)), indent=1, allow_nan=False)
    write_new(output / RESULTS, text.encode())


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def columns(results: Results) -> list[Column]:
    """Every reward's mean; behind it the share of perfect pictures where there are any."""
    made = []
    for name in results.rows[0].metrics:
        summaries = [row.metrics[name] for row in results.rows]
        made.append(Column(name, list(summaries), "{:.3f}".format, "{:+.3f}".format))
        perfect = [summary.perfect for summary in summaries]
        if any(cell.mean for cell in perfect):
            made.append(Column(f"{name} = 1", perfect, "{:.1%}".format, "{:+.1%}".format))
    return made


def text_table(results: Results) -> str:
    """Models by columns; below the base, the paired change and its interval."""
    made = columns(results)
    width = max(len(row.model) for row in results.rows)
    lines = [" | ".join([" " * width, *(f"{column.name:>30}" for column in made)])]
    for index, row in enumerate(results.rows):
        cells = [f"{_cell(column, column.cells[index]):>30}" for column in made]
        lines.append(" | ".join([row.model.ljust(width), *cells]))
    return "\n".join(lines)


def _cell(column: Column, cell: Estimate) -> str:
    if cell.mean is None:
        return "not scored"
    if cell.change is None:
        low, high = map(column.show, cell.interval)
        return f"{column.show(cell.mean)} [{low}, {high}]"
    change, low, high = map(column.show_change, (cell.change, *cell.change_interval))
    return f"{column.show(cell.mean)} {change} [{low}, {high}]"
