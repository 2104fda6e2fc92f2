"""rewards/COOKBOOK.md: its files written, its commands run in a fresh environment, as it says."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from PIL import Image

from duet.launch.rewards import read_rewards
from duet.rewards.base import RewardInput
from duet.rewards.registry import ENTRY_POINT_GROUP, load_reward, load_rewards
from tests.conftest import ROOT
from tests.judge_endpoint import Endpoint, completion

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


@pytest.fixture
def judge(kitchen):
    """A judge of edits at the address of the page's config: its marks, by what it is asked."""
    marks = {"how far has": "8", "how well has": "3", "how natural": "9"}

    def answer(body):
        *pictures, question = body["messages"][0]["content"]
        [mark] = [m for words, m in marks.items() if words in question["text"].lower()]
        assert len(pictures) == (1 if mark == "9" else 2)
        return completion(mark, {mark: 1.0})

    config = kitchen / "edit_judge.yaml"
    with Endpoint() as endpoint:
        endpoint.replies = [answer]
        config.write_text(re.sub(r"http://[^\s\"]+", endpoint.url, config.read_text()))
        yield endpoint


def test_the_cookbook_does_what_it_says(kitchen, blocks, judge):
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
    assert checked == 7 and len(servers) == 1


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
    names = ("judge.yaml", "client.yaml", "edit_judge.yaml", "edit_score.yaml")
    for name in (*names, "edit_reward_client.yaml"):
        for config in read_rewards(str(kitchen / name)):
            load_reward(config)


def test_edit_reward_is_asked_as_its_code_is(kitchen, monkeypatch):
    """Its package needs a GPU and is not here: a class that takes what its README gives."""

    class EditRewardInferencer:
        def __init__(self, config_path, checkpoint_path, reward_dim, rm_head_type):
            assert config_path.endswith(".yaml") and rm_head_type == "ranknet_multi_head"

        def reward(self, prompts, image_src, image_paths):
            assert not torch.is_grad_enabled()
            return torch.tensor([[image_src[0].width, image_paths[0].width]])

    package = SimpleNamespace(EditRewardInferencer=EditRewardInferencer)
    monkeypatch.setitem(sys.modules, "EditReward", package)
    monkeypatch.syspath_prepend(kitchen)
    [config] = read_rewards(str(kitchen / "edit_reward.yaml"))
    first, second = (Image.new("RGB", size) for size in ((40, 20), (20, 40)))
    rows = [{"sources": [second]}, {"source": second}, {"sources": [first, second]}, {}]
    inputs = [RewardInput(first, "make it blue", row) for row in rows]
    assert load_rewards([config])["EditReward"](inputs) == [20, 20, None, None]
    quality = replace(config, args=config.args | {"head": 1})
    assert load_rewards([quality])["EditReward"](inputs[:1]) == [40]
