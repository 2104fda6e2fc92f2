"""`pip install .` into a fresh environment, used from a folder whose files are named like Duet's."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("configs", "inference", "rewards", "train", "launch")
THEIRS = (
    "train.py", "rewards.py", "launch.py", "configs/__init__.py", "configs/x.py", "inference/__init__.py",
)  # fmt: skip
MY_REWARD = """
from PIL import ImageStat

class Brightness:
    def __call__(self, inputs):
        return [ImageStat.Stat(i.image.convert("L")).mean[0] / 255 for i in inputs]
"""
IMPORT_ALL = """
import importlib, json, sys
print(json.dumps([importlib.import_module(name).__file__ for name in sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what git has or would take: building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in names.split("\0"):
        if (ROOT / name).is_file() and name.split("/")[0] in (*ROOMS, "pyproject.toml", "LICENSE"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory, source) -> Path:
    """One with Duet, and with this one's other packages: a path in a .pth runs no .pth there."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages(folder) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin" / "python")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *offline, "."]
    subprocess.run(pip, cwd=source, check=True)
    return folder


def site_packages(environment: Path) -> Path:
    [folder] = environment.glob("lib/python*/site-packages")
    return folder


@pytest.fixture
def run(environment, tmp_path):
    """Runs a command of that environment in the user's folder; what it prints."""
    for name in THEIRS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('this is the user\\'s own')\n")
    (tmp_path / "my_reward.py").write_text(MY_REWARD)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(program: str, *arguments: str) -> str:
        command = [str(environment / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_every_module_and_its_data_are_installed(source, environment):
    duet = site_packages(environment) / "duet"
    wanted = {p.relative_to(source) for room in ROOMS for p in (source / room).rglob("*.py")}
    for pattern in (
        "rewards/weights/*",
        "train/templates/*.html",
        "launch/accelerate/*.yaml",
        "launch/slurm.sbatch",
    ):
        wanted |= {p.relative_to(source) for p in source.glob(pattern)}
    assert {p.suffix for p in wanted} == {
        ".py",
        ".npz",
        ".LICENSE",
        ".html",
        ".yaml",
        ".sbatch",
    }
    assert not [name for name in sorted(wanted) if not (duet / name).is_file()]


def test_the_licence_is_installed(environment):
    [told] = site_packages(environment).glob("duet-*.dist-info")
    assert "License-Expression: Apache-2.0" in (told / "METADATA").read_text()
    assert (told / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_modules_are_the_installed_ones(environment, run):
    folder = site_packages(environment)
    files = sorted((folder / "duet").rglob("*.py"))
    names = [".".join(p.relative_to(folder).with_suffix("").parts) for p in files]
    modules = [name.removesuffix(".__init__") for name in names]
    assert json.loads(run("python", "-c", IMPORT_ALL, *modules)) == [str(p) for p in files]
    assert "duet.configs" in modules


@pytest.mark.parametrize(
    "command",
    [
        "duet --help",
        "duet train --help",
        "duet settings",
        "duet --version",
        "duet evaluate --help",
        "duet generate --help",
        "duet rewards list",
        "python -m duet.launch.cli --help",
        "python -m duet.train --help",
        "python -m duet.train.evaluate --help",
        "python -m duet.inference.generate --help",
    ],
)
def test_commands_run_beside_files_of_their_names(run, command):
    printed = run(*command.split())
    expected = {"duet settings": "seed  (int", "duet --version": "duet 0."}
    assert expected.get(command, "usage: duet") in printed or "what it measures" in printed


@pytest.mark.parametrize("command", ["duet", "python -m duet.launch.cli"])
def test_a_reward_is_found_in_the_working_directory(run, command):
    picture = str(ROOT / "configs" / "tiny" / "prompts" / "eval" / "000.png")
    score = ["rewards", "score", picture, "--prompt", "x", "--reward", "my_reward.Brightness"]
    assert run(*command.split(), *score).split() == ["image", "Brightness", picture, "0.5976"]
