"""rewards/COOKBOOK.md: its files written, its commands run in a fresh environment, as it says."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from importlib.metadata import entry_points
from pathlib import Path

import httpx
import pytest

from duet.launch.rewards import read_rewards
from duet.rewards.registry import ENTRY_POINT_GROUP, load_reward
from tests.conftest import ROOT

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE = ROOT / "rewards" / "COOKBOOK.md"


@pytest.fixture(scope="module")
def blocks():
    """(language, text) of each."""
    return BLOCK.findall(PAGE.read_text())


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory, blocks):
    """A folder with the page's files, and an environment that sees this one's packages."""
    folder = tmp_path_factory.mktemp("kitchen")
    (folder / "configs").symlink_to(ROOT / "configs")
    for language, text in blocks:
        if language not in ("sh", "text"):
            name = re.match(r"# (\S+)\n", text)[1]
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    bin = folder / "venv" / "bin"
    python = bin / "python"
    packages = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    here = folder / "venv" / "lib" / version / "site-packages" / "here.pth"
    here.write_text(f"{ROOT}\n{packages}\n")
    offline = "--quiet --no-index --no-deps --no-build-isolation"
    install = f'{sys.executable} -m pip --python {python} install {offline} "${{@:2}}"'
    # -P: like an installed script, `duet` does not see the working folder
    for name, command in (("pip", install), ("duet", f'exec {python} -P -m duet.launch.cli "$@"')):
        (bin / name).write_text(f"#!/bin/bash\n{command}\n")
        (bin / name).chmod(0o755)
    return folder


def start(kitchen, command: str) -> subprocess.Popen:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONFIG_FILE")
    }
    environment["PATH"] = f"{kitchen / 'venv' / 'bin'}:{environment['PATH']}"
    return subprocess.Popen(
        ["bash", "-e", "-c", command],
        cwd=kitchen,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_cookbook_does_what_it_says(kitchen, blocks):
    assert "sharpness" not in {e.name for e in entry_points(group=ENTRY_POINT_GROUP)}
    servers, checked = [], 0
    try:
        for (language, command), (after, expected) in zip(blocks, blocks[1:], strict=False):
            if language != "sh":
                continue
            assert after == "text", "each command is followed by what it prints"
            port = re.search(r"rewards serve .* --port (\d+)", command)
            if port:
                servers.append(start(kitchen, command.replace(port[1], "0")))
                printed = line_of_a_ready_server(servers[-1], kitchen / "client.yaml", port[1])
            else:
                process = start(kitchen, command)
                printed, errors = process.communicate(timeout=120)
                assert process.returncode == 0, errors
            assert words(printed) == words(expected), command
            checked += 1
    finally:
        for process in servers:
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate(timeout=20)
    assert checked == 6 and len(servers) == 1


def line_of_a_ready_server(process: subprocess.Popen, client: Path, page_port: str) -> str:
    """What it prints, with the page's port for its own, which the client's config learns."""
    printed = process.stdout.readline()
    url, port = re.search(r"(http://\S+:(\d+))", printed).groups()
    wait_until_ready(url)
    client.write_text(client.read_text().replace(page_port, port))
    return printed.replace(port, page_port)


def words(text: str) -> list[list[str]]:
    """Of each line: a table's columns may be wider tomorrow."""
    return [line.split() for line in text.splitlines()]


def wait_until_ready(url: str) -> None:
    for _ in range(200):
        if httpx.get(f"{url}/health").status_code == 200:
            return
        time.sleep(0.05)
    raise AssertionError("the server is not ready")


def test_the_configs_that_need_a_server_can_be_built(kitchen):
    for name in ("judge.yaml", "client.yaml"):
        for config in read_rewards(str(kitchen / name)):
            load_reward(config)
