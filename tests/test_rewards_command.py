"""`duet rewards list | score | serve`: what they print, and mistakes told in one line."""

import os
import socket
import subprocess
import sys

import pytest
from PIL import Image

from duet.launch import cli
from duet.rewards.registry import BUILT_IN
from tests.conftest import ROOT

PICTURE = "configs/tiny/prompts/eval/000.png"
ASKED = [PICTURE, "--prompt", "a card"]
SEES = "tests.sample_rewards.Sees"


@pytest.fixture
def duet(monkeypatch, capsys):
    """Runs `duet rewards ...` in this process: exit status, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["duet", "rewards", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_list_tells_every_reward_and_imports_no_torch():
    code = "import sys; from duet.launch.rewards import main; main(['list']); assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert set(lines) >= set(BUILT_IN)
    assert lines["alignment"].split(maxsplit=3)[3].startswith("Cosine of image and prompt")
    assert "missing" not in done.stdout
    assert all(len(line.split()) > 4 for line in lines.values())


def test_list_tells_of_an_installed_reward_whose_module_is_gone(tmp_path, monkeypatch, duet):
    package = tmp_path / "cheer-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: cheer\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[duet.rewards]\nocr = cheer.gone:Cheer\n")
    monkeypatch.syspath_prepend(tmp_path)
    _, out, _ = duet("list")
    assert [line.split() for line in out.splitlines() if line.startswith("ocr")] == [
        ["ocr", "cheer", "(module", "cheer.gone", "is", "missing)"]
    ]


def test_score_prints_a_row_for_each_picture_and_a_column_for_each_reward(tmp_path, duet):
    Image.new("RGB", (96, 64), (14, 14, 14)).save(tmp_path / "dark.png")
    Image.new("RGB", (96, 64), (21, 21, 21)).save(tmp_path / "light.png")
    row = f'{{"image": "{tmp_path}/dark.png", "text": "CAT"}}'
    rewards = ["--reward", SEES, "--reward", "{name: tests.sample_rewards.Rank, view: low}"]
    pictures = [tmp_path / "dark.png", tmp_path / "light.png"]
    status, out, _ = duet("score", *pictures, "--prompt", "a card", "--row", row, *rewards)
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["image", "Sees", "Rank_low"],
        [f"{tmp_path}/dark.png", "25.0000", "0.0000"],  # 14 + 14 / 7 + 6 + 3
        [f"{tmp_path}/light.png", "32.0000", "1.0000"],
    ]


def test_score_takes_sources_of_a_row(tmp_path, duet, monkeypatch):
    """Relative to the working directory, in their order."""
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(("a.png", "b.png", "edit.png")):
        Image.new("RGB", (14, 7), (17 * n,) * 3).save(name)
    edit = ["score", "edit.png", "--prompt", "swap", "--reward", "tests.sample_rewards.SeesSources"]
    rows = (
        '{"sources": ["a.png", "b.png"]}',
        '{"sources": ["b.png", "a.png"]}',
        '{"source": "b.png"}',
    )
    scores = [duet(*edit, "--row", row)[1].split()[-1] for row in (*rows, "{}")]
    assert scores == ["63.0000", "61.0000", "16.0000", "n/a"]  # 14 + 7 / 7 + 17 n / 17


def test_score_takes_the_rewards_of_a_runs_config(duet):
    status, out, _ = duet("score", *ASKED, "--config", "configs/tiny/ar.yaml", "--markdown")
    head, line, scores = out.splitlines()
    assert status == 0 and head.split() == ["|", "image", "|", "alignment", "|", "aesthetic", "|"]
    assert set(line) == set("|- ") and len({len(head), len(line), len(scores)}) == 1


MISTAKES = {
    "no command": ([], "required: list | score | serve"),
    "unknown command": (["lost"], "invalid choice: 'lost'"),
    "no prompt": (["score", PICTURE, "--reward", "ocr"], "required: --prompt"),
    "no rewards": (["score", *ASKED], "give --reward or --config"),
    "unknown reward": (["score", *ASKED, "--reward", "orc"], "reward 'orc' is unknown: allowed are"),
    "unknown key": (["score", *ASKED, "--reward", "{nam: ocr}"], "unknown key '--reward[0].nam'"),
    "unknown argument": (["score", *ASKED, "--reward", f"{{name: {SEES}, args: {{x: 1}}}}"], "cannot be built"),
    "not YAML": (["score", *ASKED, "--reward", "{name"], "is not YAML"),
    "a number": (["score", *ASKED, "--reward", "3"], "--reward[0] = 3 must be a mapping"),
    "twice": (["score", *ASKED, "--reward", SEES, "--reward", SEES], "every name once: give a label"),
    "missing picture": (["score", "gone.png", "--prompt", "a", "--reward", SEES], "'gone.png' cannot be read"),
    "no picture": (["score", "pyproject.toml", "--prompt", "a", "--reward", SEES], "cannot be read"),
    "row is no JSON": (["score", *ASKED, "--reward", SEES, "--row", "{"], "is not JSON"),
    "row is a list": (["score", *ASKED, "--reward", SEES, "--row", "[]"], "must be an object"),
    "row's picture": (["score", *ASKED, "--reward", SEES, "--row", '{"image": "gone.png"}'], "gone.png' does not exist"),
    "row's source": (["score", *ASKED, "--reward", SEES, "--row", f'{{"sources": ["{PICTURE}", "gone.png"]}}'], "--row: sources[1] '"),
    "row's sources are a name": (["score", *ASKED, "--reward", SEES, "--row", f'{{"sources": "{PICTURE}"}}'], "must be a list of pictures"),
    "reward raises": (["score", *ASKED, "--reward", "tests.bad_rewards.Raises"], "raised KeyError"),
    "missing config": (["serve", "gone.yaml", "--port", "0"], "'gone.yaml' cannot be read"),
    "empty config": (["serve", "{tmp}/empty.yaml", "--port", "0"], "has no rewards"),
    "neither a run nor rewards": (["serve", "{tmp}/half.yaml", "--port", "0"], "missing key 'model'"),
    "no port": (["serve", "{tmp}/good.yaml"], "required: --port"),
    "port out of range": (["serve", "{tmp}/good.yaml", "--port", "70000"], "--port = 70000 is out of range"),
    "taken port": (["serve", "{tmp}/good.yaml", "--port", "{port}"], "cannot listen on 127.0.0.1:{port}: Address already in use"),
    "unknown host": (["serve", "{tmp}/good.yaml", "--port", "0", "--host", "a.invalid"], "cannot listen on a.invalid:0"),
    "no body": (["serve", "{tmp}/good.yaml", "--port", "0", "--max-body-mib", "0"], "--max-body-mib = 0"),
    "weights are missing": (["serve", "{tmp}/weights.yaml", "--port", "0"], "weights 'gone.pt' are missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line_and_status_2(tmp_path, duet, name):
    (tmp_path / "empty.yaml").write_text("rewards: []\n")
    (tmp_path / "half.yaml").write_text(f"rewards: [{{name: {SEES}}}]\nseed: 1\n")
    (tmp_path / "good.yaml").write_text(f"rewards: [{{name: {SEES}}}]\n")
    (tmp_path / "weights.yaml").write_text("rewards: [{name: tests.bad_rewards.NoWeights}]\n")
    arguments, message = MISTAKES[name]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        filled = {"{tmp}": str(tmp_path), "{port}": str(taken.getsockname()[1])}
        for mark, value in filled.items():
            arguments = [a.replace(mark, value) for a in arguments]
            message = message.replace(mark, value)
        status, _, errors = duet(*arguments)
    assert status == 2
    [line] = [e for e in errors.splitlines() if "error: " in e]
    assert message in line
