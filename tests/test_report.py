"""The report as a browser shows it, on a phone and on a desk, by day and by night."""

import base64
import html
import io
import json
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from duet.configs.schema import EvalConfig
from duet.train.report import write_report
from duet.train.results import ModelResult, Results
from duet.train.statistics import summarise

PROMPTS = ['a red card with the white word "CAT"', "x" * 200, "a <b>bold</b> card"]
MODELS = ["base", "decoder-checkpoint-5", "ar-checkpoint-180+decoder-checkpoint-250"]
REWARDS = ["ocr", "fidelity", "alignment", "aesthetic", "ColourObedience"]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
]  # fmt: skip
# a window has a least width, a frame has none
FRAME = """<iframe style="width:{width}px; height:900px; border:0" srcdoc="{page}"></iframe><pre></pre>
<script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument, all = s => [...page.querySelectorAll(s)];
  const look = e => page.defaultView.getComputedStyle(e), box = page.querySelector(".wide");
  document.querySelector("pre").textContent = JSON.stringify({{
    width: page.defaultView.innerWidth, page: page.documentElement.scrollWidth, table: box.scrollWidth, box: box.clientWidth,
    columns: new Set(all(".charts figure").map(e => e.offsetLeft)).size,
    paper: look(page.body).backgroundColor, ink: look(page.body).color,
    letters: [...new Set(all("svg text").map(e => look(e).fill))],
    lines: [...new Set(all("svg path").map(e => look(e).stroke))],
  }})
}}</script>"""


def reported(folder: Path, steps: list[dict], sources: Sequence[list[str]] = ()) -> str:
    """The HTML of three models, five rewards of which one scored nothing, and a run's curves.

    `sources`: of each prompt, files in the folder.
    """
    draw = random.Random(0)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    rows = []
    for model in MODELS:
        (folder / model).mkdir()
        images = [f"{model}/{n}.png" for n in range(len(PROMPTS))]
        for path in images:
            Image.new("RGB", (96, 64), "teal").save(folder / path)
        scores = {name: [[draw.random()] for _ in PROMPTS] for name in REWARDS}
        scores["ocr"][0] = [1.0]
        scores["aesthetic"] = [[float("nan")], [None], [None]]
        base = rows[0].scores if rows else None
        metrics = {n: summarise(v, base and base[n], EvalConfig()) for n, v in scores.items()}
        checkpoints = [str(folder / "checkpoint-3")] if rows else []
        rows.append(ModelResult(model, checkpoints, images, scores, metrics))
    found = Results("decoder", 0.95, PROMPTS, rows, list(sources))
    return write_report(found, folder).read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    steps = [
        {"step": s, "reward": 0.5 + s / 100, "kl": s * 1e-5, "entropy": None} for s in (1, 2, 3)
    ]
    return reported(tmp_path_factory.mktemp("report"), steps)


def test_the_page_says_what_was_found(page):
    assert "ocr = 1" in page and "fidelity = 1" not in page and "33.3%" in page
    assert page.count("not scored") == 3 and "nan" not in re.sub('base64,[^"]*', "", page)
    assert "<b>" not in page and "a &lt;b&gt;bold" in page
    assert page.count("<svg") == 2, "what was never measured has no curve"


def test_sources_stand_before_the_results_of_their_prompt(tmp_path):
    """None, one and three of them, each the picture that it is called."""
    sizes = [[], [(40, 30)], [(30, 40), (20, 20), (64, 16)]]
    sources = [[f"{n}-{i}.png" for i in range(len(of))] for n, of in enumerate(sizes)]
    for size, path in zip(sum(sizes, []), sum(sources, []), strict=True):
        Image.new("RGB", size).save(tmp_path / path)
    page = reported(tmp_path, [], sources)
    cards = page.split('<div class="card">')[1:]
    assert len(cards) == len(sizes)
    for card, of, prompt in zip(cards, sizes, PROMPTS, strict=True):
        assert html.unescape(card).startswith(prompt)
        figures = re.findall(r'base64,(.*?)" alt="(.*?):.*?<figcaption>(.*?)\s*<', card, re.DOTALL)
        names = [*(f"source {n}" for n in range(1, len(of) + 1)), *MODELS]
        assert [caption for *_, caption in figures] == [alt for _, alt, _ in figures] == names
        shown = [Image.open(io.BytesIO(base64.b64decode(data))).size for data, *_ in figures]
        assert shown == [*of, *[(96, 64)] * len(MODELS)]


@pytest.mark.parametrize("steps", [[1], [1, 2], [1, 2, 3], [250], [*range(1, 181)]], ids=len)
def test_step_axes_have_whole_numbers(tmp_path, steps):
    page = reported(tmp_path, [{"step": s, "reward": s / 7} for s in steps])
    [svg] = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    axis = svg[svg.index('id="xtick_1"') : svg.index('id="ytick_1"')]
    ticks = [int(tick) for tick in re.findall(r"<text[^>]*>([^<]*)</text>", axis)]
    assert ticks == steps or len(ticks) == len(set(ticks)) > 3


def test_a_metric_that_only_some_steps_have_is_a_curve(tmp_path):
    steps = [{"step": 1, "reward": 0.1, "watch/drop": 1}, {"step": 2, "ratio/max": 2, "reward": 1}]
    page = reported(tmp_path, [*steps, {"step": 3, "reward": 0.2}])
    captions = re.findall(
        "<figcaption>([^<]*)</figcaption><svg", re.sub(r">\s*<svg", "><svg", page)
    )
    assert [c for c in captions if c] == ["reward", "watch/drop", "ratio/max"]


@pytest.fixture(scope="module")
def seen(page, tmp_path_factory):
    """What a browser makes of the page, by width in pixels and by light."""
    folder = tmp_path_factory.mktemp("browser")

    def opened(url: str, *more: str) -> subprocess.CompletedProcess:
        """The page that is at `url` once its script has run."""
        place = [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"]
        command = [CHROMIUM, *QUIET, *place, *more, "--dump-dom", url]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH: the page is not looked at")
    tried = opened("data:text/html,it works")
    if "it works" not in tried.stdout:  # no display, no memory, a stub of a package
        pytest.skip(f"{CHROMIUM} does not run here: {tried.stderr.strip()[-200:]}")

    def measure(width: int, dark: bool) -> dict:
        file = folder / "frame.html"
        file.write_text(FRAME.format(width=width, page=html.escape(page)))
        done = opened(file.as_uri(), f"--blink-settings=preferredColorScheme={0 if dark else 1}")
        return json.loads(html.unescape(re.search("<pre>(.*?)</pre>", done.stdout)[1]))

    return {(w, dark): measure(w, dark) for w, dark in ((390, False), (1200, True))}


def luminance(colour: str) -> float:
    """Of rgb(r, g, b), relative (WCAG 2)."""
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_on_a_phone_only_the_table_scrolls(seen):
    phone, desk = seen[390, False], seen[1200, True]
    assert (phone["width"], desk["width"]) == (390, 1200), "what was asked of the browser"
    assert phone["page"] == 390 and desk["page"] == 1200
    assert phone["table"] > phone["box"] and phone["box"] <= 390 - 32
    assert (phone["columns"], desk["columns"]) == (1, 2)


@pytest.mark.parametrize(("key", "dark"), [((390, False), False), ((1200, True), True)])
def test_page_and_charts_are_readable_by_day_and_by_night(seen, key, dark):
    look = seen[key]
    assert (luminance(look["paper"]) < 0.1) is dark
    assert contrast(look["ink"], look["paper"]) > 7
    assert look["letters"] == [look["ink"]]
    drawn = [c for c in look["lines"] if c != "none"]
    assert len(drawn) == 2 and all(contrast(c, look["paper"]) > 4.5 for c in drawn)
