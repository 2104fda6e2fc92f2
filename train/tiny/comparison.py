"""What comparisons of trained models share: commands, what they found, and a table of it."""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from duet.configs.schema import EvalConfig
from duet.train.results import RESULTS
from duet.train.statistics import summarise

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "tiny"
STEPS = {"decoder": 40, "ar": 45}  # rollouts of `make quickstart`
_MEASURES = {
    "ocr": "OCR",
    "alignment": "alignment",
    "ColourObedience": "colour obedience",
    "fidelity": "fidelity",
}

# a measure: [prompts, images], None where there is no score
Scores = Mapping[str, list[list[float | None]]]


def options(told: str | None, folder: str, arguments: list[str] | None) -> argparse.Namespace:
    """--seeds and --folder, an absolute path; `told`: the module's docstring."""
    parser = argparse.ArgumentParser(
        description=told, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=lambda path: Path(path).resolve(), default=folder)
    return parser.parse_args(arguments)


def duet(command: str, *arguments: object) -> None:
    line = [sys.executable, "-m", "duet.launch.cli", command, *map(str, arguments)]
    subprocess.run(line, cwd=ROOT, check=True)


def evaluate(config: Path, checkpoints: Sequence[Path], output: Path) -> list[Scores]:
    """On the held-out prompts, the base first; a report that is there is not made again."""
    if not (output / RESULTS).is_file():
        models = [word for path in checkpoints for word in ("--checkpoint", path)]
        duet("evaluate", config, *models, "--output", output)
    rows = json.loads((output / RESULTS).read_text())["rows"]
    return [{shown: row["scores"][name] for name, shown in _MEASURES.items()} for row in rows]


def pooled(seeds: Sequence[Scores]) -> Scores:
    """Of a model a seed: all their pictures of a prompt are one model's."""
    return {
        name: [sum(images, []) for images in zip(*(s[name] for s in seeds), strict=True)]
        for name in seeds[0]
    }


@dataclass(frozen=True)
class Line:
    """Of a table: two models, prompt by prompt."""

    names: tuple[str, ...]  # the cells that say which
    scores: Scores
    base: Scores


def table(heads: Sequence[str], lines: Sequence[Line]) -> str:
    """In Markdown: each measure's change to a line's base, and its interval over prompts."""
    measures = list(_MEASURES.values())
    rows = [(*heads, *measures), ["---"] * (len(heads) + len(measures))]
    for line in lines:
        rows.append((*line.names, *(_change(line.scores[m], line.base[m]) for m in measures)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _change(scores: list, base: list) -> str:
    found = summarise(scores, base, EvalConfig())
    low, high = found.change_interval
    return f"{found.change:+.3f} [{low:+.3f}, {high:+.3f}]"
