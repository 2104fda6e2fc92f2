"""Sources that users give: each is served as a viewer shows it, or is one clear line and status 2.

By a row of a run, by a row that `generate` is given, and by its `--image`.
"""

import io
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from duet.configs.errors import exit_on_user_error
from duet.configs.rows import load_rows
from duet.inference import generate
from duet.inference.engine import Engine
from duet.inference.layout import Size
from duet.inference.outline import read_outline
from duet.inference.prompt_check import check_prompts
from duet.inference.request import Request
from duet.train.__main__ import main as train_main
from tests import forked
from tests.conftest import MODEL, ROOT, SIZE
from tests.pictures import CLEAN


def saved(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header tells of another size than its few bytes hold."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\2\0\0\0"
    png = saved(Image.new("RGB", (16, 16)))
    return png[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png[33:]


def blank(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), 128)


DARK = blank(96, 64)
SIXTEEN = Image.fromarray(np.asarray(CLEAN.convert("L")).astype(np.uint16) * 257)
FILES = {
    "card.png": saved(CLEAN),
    "text.png": b"a letter, and no picture",
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "page.pdf": saved(CLEAN, "PDF"),
    "page.eps": saved(CLEAN, "EPS"),
    "empty.png": b"",
    "cut.jpg": saved(CLEAN, "JPEG")[:700],
    "cut.png": saved(CLEAN)[:300],
    "head.png": saved(CLEAN)[:20],
    "bomb.png": claiming(60_000, 60_000),
    "huge.png": claiming(9_000, 9_000),
    "dot.png": saved(blank(1, 1)),
    "line.png": saved(blank(10_000, 10)),
    "low.png": saved(blank(60, 15)),
    "long.png": saved(blank(161, 40)),
    "float.tiff": saved(Image.new("F", (96, 64)), "TIFF"),
    "large.png": saved(blank(1024, 1024)),
    "moving.gif": saved(CLEAN, "GIF", save_all=True, append_images=[DARK]),
    "moving.webp": saved(CLEAN, "WEBP", save_all=True, append_images=[DARK], quality=95),
    "moving.png": saved(CLEAN, save_all=True, append_images=[DARK]),
    "pages.tiff": saved(CLEAN, "TIFF", save_all=True, append_images=[DARK]),
    "inks.jpg": saved(CLEAN.convert("CMYK"), "JPEG", quality=95),
    "deep.png": saved(SIXTEEN),
    "clear.png": saved(Image.new("RGBA", (96, 64), (255, 0, 0, 0)).quantize(4)),
    "lying.jpg": saved(CLEAN, "JPEG", exif=turned(), quality=95),
    "bits.png": saved(CLEAN.convert("1")),
    "tail.jpg": saved(CLEAN, "JPEG", quality=95) + b"and more",
    "png.jpg": saved(CLEAN),
    "bare": saved(CLEAN),
    "a b\n\u00e4 \u732b.png": saved(CLEAN),
    "thin.webp": saved(CLEAN.resize((40, 17)), "WEBP"),
    "four.png": saved(blank(160, 40)),
}
ONE = Size(64, 96)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("sources")
    for name, content in FILES.items():
        (made / name).write_bytes(content)
    (made / "folder.png").mkdir()
    (made / "dangling.png").symlink_to(made / "gone.png")
    (made / "circle.png").symlink_to(made / "circle.png")
    (made / "link.png").symlink_to(made / "card.png")
    os.mkfifo(made / "pipe.png")
    return made


# what `sources` holds, and a part of the line
GIVEN = {
    "a missing file": (["gone.png"], "sources[0] '{folder}gone.png' does not exist, or is no file"),
    "a directory": (["folder.png"], "is no file"),
    "a dangling link": (["dangling.png"], "does not exist"),
    "a link to itself": (["circle.png"], "does not exist"),
    "a pipe, which nobody fills": (["pipe.png"], "is no file"),
    "a device": (["/dev/zero"], "sources[0] '/dev/zero' does not exist, or is no file"),
    "an empty name": ([""], "sources[0] = '' must be a picture or its path"),
    "a URL": (["https://a.b/c.png"], "sources[0] = 'https://a.b/c.png' is a URL: download it"),
    "a file's URL": (["card.png", "file:///c.png"], "sources[1] = 'file:///c.png' is a URL"),
    "a data URL": (["data:image/png;base64,AAAA"], "is a URL: download it"),
    "base64": (["A" * 100_000], "... (100,0"),
    "text named .png": (["card.png", "text.png"], "sources[1]: picture '{folder}text.png' cannot be read: it is none of PNG"),
    "SVG": (["drawing.svg"], "it is none of PNG, JPEG"),
    "PDF": (["page.pdf"], "it is none of PNG, JPEG"),
    "EPS": (["page.eps"], "it is none of PNG, JPEG"),
    "0 bytes": (["empty.png"], "empty.png' cannot be read: it is none of"),
    "a truncated JPEG": (["cut.jpg"], "cut.jpg' cannot be read: "),
    "a truncated PNG": (["cut.png"], "cut.png' cannot be read: "),
    "half of a header": (["head.png"], "head.png' cannot be read: "),
    "3.6 gigapixels": (["bomb.png"], "bomb.png' cannot be read: Image size"),
    "81 megapixels": (["huge.png"], "huge.png' has 9000 x 9000 pixels: allowed are 67108864"),
    "no known range": (["float.tiff"], "mode F has no known range: save it with 8 or 16 bits"),
    "1 x 1": (["dot.png"], "sources[0]: a source of 1 x 1 pixels: allowed are sides of at least 16 pixels"),
    "10,000 x 10": (["card.png", "line.png"], "sources[1]: a source of 10000 x 10 pixels: allowed are"),
    "15 pixels high": (["low.png"], "a source of 60 x 15 pixels: allowed are sides of at least 16"),
    "longer than 4 : 1": (["long.png"], "a source of 161 x 40 pixels: allowed are sides of at least 16 pixels, the longer at most 4 times"),
    "too many tokens": (["large.png"] * 3, "its 3 sources and its picture are "),
    "too many": (["card.png"] * 350, "its 350 sources and its picture are 2106 tokens, of the 2048 that the AR takes, and leave no room for a prompt: give fewer sources"),
}  # fmt: skip
# what only a row can hold
ROWS = {
    "a number in the list": ({"sources": ["card.png", 3]}, "sources[1] = 3 must be a picture or its path"),
    "a truth": ({"sources": [True]}, "sources[0] = True must be a picture"),
    "null in the list": ({"sources": [None]}, "sources[0] = None must be a picture"),
    "a list in the list": ({"sources": [["card.png"]]}, "sources[0] = ['card.png'] must be a picture"),
    "an object in the list": ({"sources": [{"file": "card.png"}]}, "sources[0] = {{'file': 'card.png'}} must be a picture"),
    "a picture's null": ({"sources": [{"bytes": None, "path": None}]}, "sources[0] = None must be a picture"),
    "an empty list": ({"sources": []}, "sources = [] must be a list of pictures or their paths, with one at least"),
    "a name and no list": ({"sources": "card.png"}, "sources = 'card.png' must be a list"),
    "a dict and no list": ({"sources": {"a": "card.png"}}, "sources = {{'a': 'card.png'}} must be a list of pictures"),
    "a number and no list": ({"sources": 0}, "sources = 0 must be a list"),
    "false and no list": ({"sources": False}, "sources = False must be a list"),
    "a list as one": ({"source": ["card.png"]}, "source = ['card.png'] must be a picture"),
    "both": ({"source": "card.png", "sources": ["card.png"]}, "has both source and sources: put all into sources"),
    "NUL in a name": ({"sources": ["a\0.png"]}, "does not exist"),
    "half a surrogate": ({"sources": ["\ud800.png"]}, "does not exist"),
    "a control token": ({"sources": ["card.png"], "prompt": "on <|image|>"}, "the prompt holds '<|image|>'"),
    "a wanted picture that is gone": ({"sources": ["card.png"], "image": "gone.png"}, "image '{folder}gone.png' does not exist"),
}  # fmt: skip
BY_ROW = {name: ({"sources": given}, told) for name, (given, told) in GIVEN.items()} | ROWS


def written(folder: Path, row: dict) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a card"}) + "\n" + json.dumps({"prompt": "x"} | row))
    return path


def by_run(data: str, output: Path) -> None:
    AcceleratorState._reset_state(True)
    train_main([f"{ROOT}/configs/tiny/ar.yaml", f"output_dir={output}", data])


def by_generate(arguments: list[str], output: Path) -> None:
    generate.main(["--model", str(MODEL), "--output", str(output), *arguments])


@pytest.fixture(scope="module")
def outline():
    return read_outline(str(MODEL))


@pytest.fixture
def refusal(pictures, tmp_path, monkeypatch, capsys, outline):
    """The line that a command ends with; nothing that was there before is another than it was."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "000-seed0.png").write_bytes(b"of yesterday")
    (output / "notes.txt").write_text("mine")
    for module in ("duet.inference.outline", "duet.train.setup"):  # read once for all
        monkeypatch.setattr(f"{module}.read_outline", lambda path: outline)

    def passed(*_):
        raise AssertionError("the rows have passed")

    for later in ("duet.train.setup.load_scorers", "duet.inference.model.load_pipeline"):
        monkeypatch.setattr(later, passed)

    def stood() -> dict:
        """What every file holds."""
        files = [p for p in (*output.rglob("*"), *pictures.iterdir()) if p.is_file()]
        return {p: p.read_bytes() for p in files if p.name != ".lock"}

    def made(command) -> str:
        before = stood()
        with pytest.raises(SystemExit) as caught:
            exit_on_user_error(lambda: command(output))
        assert caught.value.code == 2
        assert stood() == before
        out, errors = capsys.readouterr()
        [line] = [line for line in errors.splitlines() if line.strip()]
        assert line.startswith("duet: error: ") and len(line) < 500 and not out
        return line.removeprefix("duet: error: ")

    return made


@pytest.mark.parametrize("name", BY_ROW)
def test_a_bad_row_ends_a_run_before_it_begins(pictures, refusal, name):
    row, message = BY_ROW[name]
    data = f"data.train={written(pictures, row)}"
    told = refusal(lambda output: by_run(data, output))
    assert told.startswith(f"{pictures}/rows.jsonl:2")
    assert message.format(folder=f"{pictures}/") in told


@pytest.mark.parametrize("name", ["a missing file", "1 x 1"])
def test_held_out_rows_are_checked_too(pictures, refusal, name):
    row, message = BY_ROW[name]
    data = f"data.eval={written(pictures, row)}"
    told = refusal(lambda output: by_run(data, output))
    assert message.format(folder=f"{pictures}/") in told


@pytest.mark.parametrize("name", BY_ROW)
def test_a_bad_row_draws_nothing(pictures, refusal, name):
    row, message = BY_ROW[name]
    arguments = ["--prompts", str(written(pictures, row))]
    told = refusal(lambda output: by_generate(arguments, output))
    assert told.startswith(f"{pictures}/rows.jsonl:2")
    assert message.format(folder=f"{pictures}/") in told


@pytest.mark.parametrize("name", GIVEN)
def test_a_bad_image_draws_nothing(pictures, refusal, name, monkeypatch):
    given, message = GIVEN[name]
    monkeypatch.chdir(pictures)
    arguments = ["--prompt", "x", *(word for path in given for word in ("--image", path))]
    told = refusal(lambda output: by_generate(arguments, output))
    assert told.startswith("--prompt[0]")
    assert message.format(folder="") in told


def test_a_command_of_its_own_says_so(pictures, tmp_path):
    arguments = ["--model", str(MODEL), "--image", "text.png", "--prompt", "x"]
    output = ["--output", str(tmp_path / "out")]
    done = forked.run("duet.inference.generate", *arguments, *output, folder=pictures)
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "out").exists()
    assert re.fullmatch(r"duet: error: .*text.png.* cannot be read: .*\n", done.stderr)


# what is served, and how large it comes to the model
SERVED = {
    "moving.gif": ONE,
    "moving.webp": ONE,
    "moving.png": ONE,
    "pages.tiff": ONE,
    "inks.jpg": ONE,
    "deep.png": ONE,
    "clear.png": ONE,
    "lying.jpg": Size(96, 64),
    "bits.png": ONE,
    "tail.jpg": ONE,
    "png.jpg": ONE,
    "bare": ONE,
    "link.png": ONE,
    "a b\n\u00e4 \u732b.png": ONE,
    "thin.webp": Size(32, 64),
    "four.png": Size(32, 128),
}


def expected(name: str) -> Image.Image:
    """What a viewer shows."""
    match name:
        case "clear.png":
            return Image.new("RGB", (96, 64), "white")
        case "deep.png" | "bits.png":
            return CLEAN.convert("L" if name == "deep.png" else "1").convert("RGB")
        case "lying.jpg":
            return CLEAN.transpose(Image.Transpose.ROTATE_270)
        case "thin.webp" | "four.png":
            return Image.open(io.BytesIO(FILES[name])).convert("RGB")
    return CLEAN


def check_served(names, sources) -> None:
    for name, picture in zip(names, sources, strict=True):
        size = SERVED[name]
        assert (picture.mode, picture.size) == ("RGB", (size.width, size.height)), name
        shown = expected(name).resize(picture.size, Image.Resampling.LANCZOS)
        apart = np.abs(np.asarray(picture, dtype=float) - np.asarray(shown)).mean()
        assert apart < 8, f"{name} is {apart:.1f} off what a viewer shows"


def test_any_other_source_is_served_as_a_viewer_shows_it(pictures, outline, engine):
    """In a row of its own, named twice, beside four others."""
    lists = [[name] for name in SERVED] + [["bare", "bare"], list(SERVED)[4:9]]
    rows = [json.dumps({"prompt": "x", "sources": names}) + "\n" for names in lists]
    (pictures / "served.jsonl").write_text("".join(rows))
    rows = load_rows(pictures / "served.jsonl")
    check_prompts(outline, rows, SIZE)
    for names, row in zip(lists, rows, strict=True):
        ready = engine.ready(Request(row.prompt, (1,), SIZE, row.sources))
        check_served(names, ready.sources)
        assert [len(t) for t in ready.source_tokens] == [SERVED[n].grid.count for n in names]


@pytest.fixture
def drawn(pictures, tmp_path, monkeypatch):
    """What `generate` makes of its arguments in one step: requests as drawn, pictures' sizes."""
    asked, true = [], Engine.ready

    def ready(self, request):
        asked.append(true(self, request))
        return asked[-1]

    monkeypatch.setattr(Engine, "ready", ready)
    monkeypatch.chdir(pictures)

    def run(*arguments):
        by_generate([*arguments, "--steps", "1"], tmp_path / "out")
        paths = sorted((tmp_path / "out").glob("*.png"))
        return asked, [Image.open(path).size for path in paths]

    return run


def test_generate_serves_them_all_at_once(drawn):
    """Sixteen sources of one picture, which has the first one's size."""
    asked, sizes = drawn("--prompt", "x", *(w for name in SERVED for w in ("--image", name)))
    assert sizes == [(96, 64)]
    for request in asked:
        check_served(SERVED, request.sources)


def test_generate_takes_the_columns_of_a_dataset(drawn, pictures):
    """`source`, `sources`, `image` (which no picture needs) and none, in one file."""
    rows = [
        {"prompt": "w", "image": "four.png"},
        {"prompt": "x", "source": "lying.jpg"},
        {"prompt": "y", "sources": ["four.png", "bare"], "image": "card.png"},
        {"prompt": "z", "sources": None, "source": None},
    ]
    (pictures / "columns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked, sizes = drawn("--prompts", "columns.jsonl")
    assert sizes == [(96, 64), (64, 96), (128, 32), (96, 64)]
    of = {request.prompt: request.sources for request in asked}
    assert not of["w"] and not of["z"]
    check_served(["lying.jpg"], of["x"])
    check_served(["four.png", "bare"], of["y"])
