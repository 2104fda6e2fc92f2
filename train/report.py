"""One self-contained HTML page: table, curves, pictures before and after."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from duet.configs.outputs import write_new
from duet.inference.pictures import to_png
from duet.train.log import image_grid
from duet.train.metrics import read_metrics
from duet.train.results import PAGE, STRIP, ModelResult, Results, columns

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402  the backend must be chosen first
from matplotlib.ticker import MaxNLocator  # noqa: E402

_PICTURES = 24  # prompts shown; the folder holds the rest
_STRIP = 8  # prompts of the strip before/after
_CURVES = ("reward", "eval/", "watch/", "kl", "entropy", "ratio/", "frac_reward_zero_std")
# stand for the page's colours, which matplotlib has no word for
_INK, _CURVE = "#0a0b0c", "#0d0e0f"
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_NO_CURVES = ("not_scored", "/std", "seconds", "samples_per_second")


def write_report(results: Results, output: Path) -> Path:
    """Write `output/index.html`; opens without a network."""
    environment = Environment(loader=PackageLoader("duet.train"), autoescape=select_autoescape())
    template = environment.get_template("report.html")
    rows = results.rows
    pictures = [
        {
            "prompt": prompt,
            "sources": [_data_uri(output / path) for path in sources],
            "shown": [_picture(row, results, index, output) for row in rows],
        }
        for index, (prompt, sources) in enumerate(_shown(results))
    ]
    page = template.render(
        stage=results.stage,
        confidence=results.confidence,
        rows=rows,
        columns=columns(results),
        prompts=len(results.prompts),
        runs=_runs(rows),
        pictures=pictures,
    )
    path = output / PAGE
    write_new(path, page.encode(errors="backslashreplace"))
    return path


def write_strip(results: Results, output: Path) -> Path:
    """`output/before_after.png`: the first prompts, the base above, the last model below."""
    chosen = [
        Image.open(output / path)
        for row in (results.rows[0], results.rows[-1])
        for path in _first_pictures(row, results)[:_STRIP]
    ]
    path = output / STRIP
    write_new(path, to_png(image_grid(chosen, len(chosen) // 2)))
    return path


def _shown(results: Results) -> list[tuple[str, list[str]]]:
    """The first prompts, each with its sources."""
    sources = results.sources or [[]] * len(results.prompts)
    return list(zip(results.prompts, sources, strict=True))[:_PICTURES]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _picture(row: ModelResult, results: Results, index: int, output: Path) -> dict:
    return {
        "model": row.model,
        "data": _data_uri(output / _first_pictures(row, results)[index]),
        "scores": {name: values[index][0] for name, values in row.scores.items()},
    }


def _first_pictures(row: ModelResult, results: Results) -> list[str]:
    """Each prompt's first picture, relative to the report's folder."""
    return row.images[:: len(row.images) // len(results.prompts)]


def _runs(rows: list[ModelResult]) -> list[dict]:
    """The training curves of every run that a checkpoint came from."""
    folders = {Path(c).resolve().parent for row in rows for c in row.checkpoints}
    return [{"name": f.name, "charts": _charts(read_metrics(f))} for f in sorted(folders)]


def _charts(steps: list[dict]) -> list[dict]:
    """A curve a metric, as inline SVG."""
    charts = []
    for name in dict.fromkeys(name for step in steps for name in step):
        known = [(s["step"], s[name]) for s in steps if s.get(name) is not None]
        if known and name.startswith(_CURVES) and not name.endswith(_NO_CURVES):
            charts.append({"name": name, "svg": _chart(*zip(*known, strict=True))})
    return charts


def _chart(steps: Sequence[int], values: Sequence[float]) -> str:
    """In the page's own colours and letters, which follow its light or dark."""
    with pyplot.rc_context({name: _INK for name in _INKED} | {"svg.fonttype": "none"}):
        figure, axis = pyplot.subplots(figsize=(3.6, 2.1))
        axis.plot(steps, values, linewidth=1.2, color=_CURVE, marker="" if len(steps) > 1 else "o")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axis.tick_params(labelsize=7)
        axis.yaxis.offsetText.set_fontsize(7)
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
        pyplot.close(figure)
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return svg.replace(_INK, "currentColor").replace(_CURVE, "var(--curve)")
