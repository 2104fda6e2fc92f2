"""One self-contained HTML page: table, curves, pictures before and after."""

import base64
import io
from pathlib import Path

import matplotlib
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from duet.train.evaluation import ModelResult, Results
from duet.train.log import image_grid
from duet.train.metrics import read_metrics

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402  the backend must be chosen first

_PICTURES = 24  # prompts shown; the folder holds the rest
_STRIP = 8  # prompts of the strip before/after
_CURVES = ("reward", "watch/", "kl", "entropy", "ratio/", "frac_reward_zero_std")
_NO_CURVES = ("not_scored", "/std", "seconds", "samples_per_second")


def write_report(results: Results, output: Path) -> Path:
    """Write `output/index.html`; opens without a network."""
    environment = Environment(loader=PackageLoader("duet.train"), autoescape=select_autoescape())
    template = environment.get_template("report.html")
    rows = results.rows
    pictures = [
        {
            "prompt": prompt,
            "shown": [_picture(row, results, index, output) for row in rows],
        }
        for index, prompt in enumerate(results.prompts[:_PICTURES])
    ]
    page = template.render(
        stage=results.stage,
        confidence=results.confidence,
        rows=rows,
        rewards=list(rows[0].metrics),
        prompts=len(results.prompts),
        curves=_curves(rows),
        pictures=pictures,
    )
    path = output / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def write_strip(results: Results, output: Path) -> Path:
    """`output/before_after.png`: the first prompts, the base above, the last model below."""
    chosen = [
        Image.open(output / path)
        for row in (results.rows[0], results.rows[-1])
        for path in _first_pictures(row, results)[:_STRIP]
    ]
    path = output / "before_after.png"
    image_grid(chosen, len(chosen) // 2).save(path)
    return path


def _picture(row: ModelResult, results: Results, index: int, output: Path) -> dict:
    data = (output / _first_pictures(row, results)[index]).read_bytes()
    return {
        "model": row.model,
        "source": "data:image/png;base64," + base64.b64encode(data).decode(),
        "scores": {name: values[index][0] for name, values in row.scores.items()},
    }


def _first_pictures(row: ModelResult, results: Results) -> list[str]:
    """Each prompt's first picture, relative to the report's folder."""
    return row.images[:: len(row.images) // len(results.prompts)]


def _curves(rows: list[ModelResult]) -> list[dict]:
    """The training curves of every run that a checkpoint came from, as inline SVG."""
    runs = {Path(c).resolve().parent for row in rows for c in row.checkpoints}
    curves = []
    for run in sorted(runs):
        steps = read_metrics(run)
        if steps:
            curves.append({"run": run.name, "svg": _chart(steps)})
    return curves


def _chart(steps: list[dict]) -> str:
    names = [n for n in steps[-1] if n.startswith(_CURVES) and not n.endswith(_NO_CURVES)]
    columns = 3
    lines = -(-len(names) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(11, 2.1 * lines), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        known = [(s["step"], s[name]) for s in steps if s.get(name) is not None]
        axis.plot(*zip(*known, strict=True), linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
