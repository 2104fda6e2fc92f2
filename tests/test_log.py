"""What a run tells and keeps: metrics, trackers, the folder, the terminal and the log file."""

import json
import os
import pty
import subprocess
import sys
import termios
from importlib.metadata import version

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.train.checkpoint import Inputs
from duet.train.metrics import read_metrics
from duet.train.resume import Start
from duet.train.trackers import prepare_trackers, tracker_arguments
from tests.conftest import ROOT, train

SHARP = "rewards=[{name: duet.train.tiny.hackable.Sharpness}]"


@pytest.mark.parametrize(
    ("line", "number"),
    [(b"{}", 1), (b'{"step": 2, "rew', 2), (b"\x00\xff\xfe", 2), (b"[1]", 2), (b'{"step": "x"}', 2), (b"", 2), (b"null", 3)],
)  # fmt: skip
def test_a_mangled_line_of_metrics_is_told_by_its_number(tmp_path, line, number):
    whole = [b'{"step": 1}', b'{"step": 2}', b'{"step": 3}']
    whole[number - 1] = line
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(whole) + b"\n")
    with pytest.raises(UserError, match=rf"metrics.jsonl:{number} is no line .* delete that line"):
        read_metrics(tmp_path)
    assert path.read_bytes() == b"\n".join(whole) + b"\n"


def test_a_last_line_cut_short_is_none(tmp_path):
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "rew\xff')
    assert read_metrics(tmp_path) == [{"step": 1}]


NETRC = "machine {host} login user password {key}\n"
SERVER = "[default]\nbase_url = https://own.example:8080\n"


@pytest.mark.parametrize(
    ("variables", "files", "offline"),
    [
        ({}, {}, True),
        ({"WANDB_API_KEY": "k"}, {}, False),
        ({}, {".netrc": NETRC.format(host="api.wandb.ai", key="k")}, False),
        ({}, {"_netrc": NETRC.format(host="api.wandb.ai", key="k")}, False),
        ({}, {".netrc": NETRC.format(host="github.com", key="k")}, True),
        ({}, {".netrc": "machine\x00"}, True),
        ({"NETRC": "mine"}, {"mine": NETRC.format(host="api.wandb.ai", key="k")}, False),
        ({"NETRC": "mine"}, {".netrc": NETRC.format(host="api.wandb.ai", key="k")}, True),
        ({"WANDB_BASE_URL": "https://own.example"}, {".netrc": NETRC.format(host="own.example", key="k")}, False),
        ({"WANDB_BASE_URL": "https://own.example"}, {".netrc": NETRC.format(host="api.wandb.ai", key="k")}, True),
        ({}, {".config/wandb/settings": SERVER, ".netrc": NETRC.format(host="own.example", key="k")}, False),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, {"token": "x"}, False),
        ({"WANDB_IDENTITY_TOKEN_FILE": "gone"}, {}, True),
    ],
)  # fmt: skip
def test_wandb_without_a_login_goes_offline(
    small_run, monkeypatch, tmp_path, variables, files, offline
):
    for name in list(os.environ):
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "")  # so that what is set is undone
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(
            name, value if name in ("WANDB_API_KEY", "WANDB_BASE_URL") else str(tmp_path / value)
        )
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    prepare_trackers(small_run("ar", "train.trackers=[wandb]"))
    assert (os.environ.get("WANDB_MODE") == "offline") == offline


def test_a_resumed_run_is_the_same_run_of_wandb(small_run):
    config, inputs = small_run("ar", "train.trackers=[wandb, tensorboard]"), Inputs({}, "")
    first, again = (tracker_arguments(config, Start("a-run", inputs, step=step)) for step in (0, 5))
    assert first["wandb"] == again["wandb"] == {"id": "a-run", "resume": "allow"}
    assert [a["tensorboard"]["purge_step"] for a in (first, again)] == [1, 6]


def test_a_folder_that_cannot_be_written_is_one_line(small_run):
    with pytest.raises(UserError, match="output_dir = '/proc/run' cannot be written"):
        train(small_run("ar", "output_dir=/proc/run"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that was killed after its second step was logged, and went on from the first."""
    os.chdir(ROOT)
    run = tmp_path_factory.mktemp("resumed")
    small = [
        f"output_dir={run}", "rollout.prompts_per_step=2", "rollout.num_generations=4", SHARP,
        "optim.per_device_train_batch_size=4", "sampling.num_inference_steps=6",
        "train.max_steps=2", "train.save_steps=1", "train.trackers=[tensorboard]",
    ]  # fmt: skip
    path = ROOT / "configs" / "tiny" / "decoder.yaml"
    train(load_config(path, small))
    newest = run / "checkpoint-2"
    newest.rename(run / "later")
    train(load_config(path, [*small, "train.resume=latest"]))
    return run


def test_each_step_stands_in_tensorboard_once(resumed):
    events = EventAccumulator(str(resumed / "duet"))
    events.Reload()
    assert [e.step for e in events.Scalars("reward")] == [1, 2]
    assert len(list((resumed / "duet").glob("events*"))) == 2


def test_a_run_folder_says_how_it_came_about(resumed):
    assert load_config(resumed / "config.yaml").output_dir == str(resumed)
    first, second = (json.loads(line) for line in (resumed / "starts.jsonl").open())
    assert (first["step"], second["step"]) == (0, 1)
    assert first["packages"]["torch"] == version("torch") and first["command"] == sys.argv
    assert first["config"]["train"]["resume"] is None
    assert second["config"]["train"]["resume"] == "latest"


def test_a_log_has_plain_lines(resumed):
    log = (resumed / "train.log").read_text()
    assert "\r" not in log and "\x1b" not in log
    lines = [line.split(" ", 2)[2] for line in log.splitlines()]
    assert lines[0].startswith("transformer of configs/tiny/model: ")
    assert "parameters train, in 36 layers; cpu, float32" in lines[0]
    assert lines[1] == "step 1 to 2 from fresh weights"
    steps = [line for line in lines if line.startswith("step") and ": decoder reward" in line]
    assert [line.partition(":")[0] for line in steps] == ["step 1/2", "step 2/2", "step 2/2"]
    assert any(line.startswith("a step takes") and "1 more end about 20" in line for line in lines)
    assert lines[-3].startswith("decoder reward 0.0") and "->" in lines[-3]
    checkpoint = resumed / "checkpoint-2"
    assert lines[-1] == f"next: duet evaluate {resumed / 'config.yaml'} --checkpoint {checkpoint}"


def on_terminal(*arguments: str) -> str:
    """What a command that fails writes to a terminal of its own."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    done = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=its, stderr=its)
    os.close(its)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        written += part
    assert done.wait() == 2
    os.close(ours)
    return written.decode()


def test_an_error_stands_on_a_line_of_its_own(tmp_path):
    written = on_terminal(
        "-m", "duet.train", "configs/tiny/decoder.yaml", f"output_dir={tmp_path}",
        "rewards=[{name: tests.bad_rewards.Raises}]", "rollout.prompts_per_step=1",
        "rollout.num_generations=2", "optim.per_device_train_batch_size=2", "sampling.num_inference_steps=6",
    )  # fmt: skip
    assert "train:   0%" in written, "a terminal has bars"
    before, _, after = written.partition("duet: error: ")
    assert before[-1] in "\r\n" and "raised KeyError" in after
    assert after.count("\n") == 1 and "%" not in after, "nothing is drawn behind it"
