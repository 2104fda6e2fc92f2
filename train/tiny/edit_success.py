"""How often held-out edits succeed, kind by kind: of the base, and of checkpoints.

    python -m duet.train.tiny.edit_success CONFIG [--checkpoint X ...] [--output DIR]
    python -m duet.train.tiny.edit_success REPORT

The first evaluates a run's model on configs/tiny/prompts/edits_eval.jsonl; the second reads a
folder in which that was done. Prints a table: the base's means, and below them each checkpoint's
paired changes to it, with 95 % intervals over prompts. Writes edits.png into the report: two edits
of each kind; from above: first and second source, wanted, of the base, of the last checkpoint.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from duet.configs.errors import UserError, exit_on_user_error
from duet.configs.pictures import read_picture
from duet.configs.row import Row
from duet.configs.rows import load_rows
from duet.configs.schema import EvalConfig
from duet.train.log import image_grid
from duet.train.results import BASE, RESULTS
from duet.train.statistics import summarise
from duet.train.tiny.comparison import CONFIGS, duet
from duet.train.tiny.edits import KINDS, WORD
from duet.train.tiny.world import HEIGHT_PIXELS, WIDTH_PIXELS

ROWS = CONFIGS / "prompts" / "edits_eval.jsonl"
_CLIP = f"{{model: 'local-dir:{CONFIGS}/judges/clip', pretrained: null}}"
_OCR = "{limit_side_len: 192, enlarge_to: 192, threads: 1}"
# `rewards` too: those of a run need not apply to edits
OVERRIDES = (
    f"data.eval={ROWS}",
    "rewards=[{name: duet.train.tiny.obedience.EditSuccess}]",
    f"eval.rewards=[{{name: duet.train.tiny.obedience.EditKept}}, {{name: ocr, args: {_OCR}}}, "
    f"{{name: fidelity, args: {_CLIP}}}]",
)
_SHOWN = 2  # edits a kind
MEASURES = {"EditSuccess": "success", "EditKept": "kept", "ocr": "OCR", "fidelity": "fidelity"}


def read_models(report: Path, rows: Sequence[Row]) -> list[dict]:
    """Of each model, the base first, what the report tells. Raises UserError for another report."""
    results = json.loads((report / RESULTS).read_text())
    if results["prompts"] != [row.prompt for row in rows]:
        raise UserError(f"{report} is no evaluation on {ROWS}: give the config, and an --output")
    return results["rows"]


def table(models: Sequence[dict], rows: Sequence[Row]) -> str:
    """In Markdown, a line for each model and kind, and for the edits that change the word."""
    places = {kind: _places(rows, kind) for kind in KINDS}
    places["changed word"] = [i for i, row in enumerate(rows) if row["edit"]["asked"] == [WORD]]
    places["all"] = list(range(len(rows)))
    base, lines = models[0]["scores"], []
    for made in models:
        for kind, own in places.items():
            cells = [_cell(made, base, name, own) for name in MEASURES if name in base]
            lines.append((made["model"], kind, *cells))
    heads = ("model", "kind", *(shown for name, shown in MEASURES.items() if name in base))
    lines = [heads, ("---",) * len(heads), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _places(rows: Sequence[Row], kind: str) -> list[int]:
    return [i for i, row in enumerate(rows) if row["kind"] == kind]


def _cell(made: dict, base: dict, name: str, places: Sequence[int]) -> str:
    scores, before = ([table[name][i] for i in places] for table in (made["scores"], base))
    if made["model"] == BASE:
        found = summarise(scores, None, EvalConfig())
        return "{:.3f} [{:.3f}, {:.3f}]".format(found.mean, *found.interval)
    found = summarise(scores, before, EvalConfig())
    low, high = found.change_interval
    return f"{found.mean:.3f} ({found.change:+.3f} [{low:+.3f}, {high:+.3f}])"


def write_strip(report: Path, models: Sequence[dict], rows: Sequence[Row]) -> None:
    """`report/edits.png`, made anew."""
    chosen = [i for kind in KINDS for i in _places(rows, kind)[:_SHOWN]]
    pictures = []
    for nth in range(2):
        pictures += [_source(rows[i], nth) for i in chosen]
    pictures += [rows[i].picture("image") for i in chosen]
    for model in (models[0], models[-1]):
        each = len(model["images"]) // len(rows)
        pictures += [Image.open(report / model["images"][i * each]) for i in chosen]
    image_grid(pictures, len(chosen)).save(report / "edits.png", optimize=True)


def _source(row: Row, nth: int) -> Image.Image:
    """Blank where the row has fewer."""
    if nth < len(row.sources):
        return read_picture(row.sources[nth])
    return Image.new("RGB", (WIDTH_PIXELS, HEIGHT_PIXELS), "white")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("given", type=Path, help="YAML of a run, or the folder of a report")
    parser.add_argument("--checkpoint", action="append", default=[], help="as of `duet evaluate`")
    parser.add_argument("--output", type=Path, default="runs/edit_success", help="of the report")
    asked = parser.parse_args(arguments)
    report = asked.given
    if not report.is_dir():
        models = [word for path in asked.checkpoint for word in ("--checkpoint", path)]
        report = asked.output.resolve()
        duet("evaluate", asked.given.resolve(), *OVERRIDES, *models, "--output", report)
    rows = load_rows(ROWS)
    models = read_models(report, rows)
    print(table(models, rows))
    write_strip(report, models, rows)


if __name__ == "__main__":
    exit_on_user_error(main)
