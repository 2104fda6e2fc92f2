"""Ends of a run: what is left, what is said, and that going on ends in the very same weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from duet.configs.errors import UserError, exit_on_user_error
from duet.configs.load import load_config
from duet.inference import together
from duet.inference.engine import Engine
from duet.train.checkpoint import complete_checkpoints
from duet.train.endings import Endings
from duet.train.policy import Policy
from tests.conftest import ROOT, adapter_weights, train

STEPS = ["train.max_steps=3", "train.save_steps=9", "optim.gradient_accumulation_steps=1"]


def assert_same(one: Path, other: Path) -> None:
    expected, reached = adapter_weights(one), adapter_weights(other)
    assert expected.keys() == reached.keys()
    assert all(torch.equal(expected[name], reached[name]) for name in expected)
    for name in ("optimizer.bin", "scheduler.bin"):
        assert (one / "state" / name).read_bytes() == (other / "state" / name).read_bytes()
    ended, resumed = (
        torch.load(c / "state" / "random_states_0.pkl", weights_only=False)["torch_manual_seed"]
        for c in (one, other)
    )
    assert torch.equal(ended, resumed)


def in_step(monkeypatch, owner: type, name: str, step: int, act) -> None:
    """Before the step-th call of the method (the first is 1), `act` is called once."""
    true, calls = getattr(owner, name), []

    def patched(self, *given, **named):
        calls.append(None)
        if len(calls) == step:
            act()
        return true(self, *given, **named)

    monkeypatch.setattr(owner, name, patched)


def signalled(number: int):
    return lambda: os.kill(os.getpid(), number)


def failing(error: BaseException):
    def fail():
        torch.rand(3)  # what a reward or dropout may have drawn since the last finished step
        raise error

    return fail


def make(stage: str, folder: Path, *overrides: str):
    small = [
        "rollout.prompts_per_step=2", "rollout.num_generations=4", "grpo.num_iterations=1",
        "optim.per_device_train_batch_size=4", "optim.lr_scheduler_type=constant",
        "sampling.num_inference_steps=4", "sde.window_start_max=0", "train.trackers=[]",
        "rewards=[{name: duet.train.tiny.hackable.Sharpness}]", *STEPS,
    ]  # fmt: skip
    path = ROOT / "configs" / "tiny" / f"{stage}.yaml"
    return load_config(path, [*small, f"output_dir={folder}", *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last checkpoint of a stage's run that nothing ends; each stage runs once."""

    @cache
    def run(stage: str) -> Path:
        return train(make(stage, tmp_path_factory.mktemp(stage)))

    return run


# where, in which call, and what: (owner, method, calls before the second step ends, act, status, text)
# as torch tells it, with its advice
NO_ROOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which "
    "1.19 GiB is free.\nIncluding non-PyTorch memory, this process has 138.60 GiB memory in use."
)  # fmt: skip
TOLD = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
ENDS = {
    "SIGTERM while sampling": (Engine, "decode", 3, signalled(signal.SIGTERM), 143, "SIGTERM ended the run"),
    "SIGINT in an update": (Policy, "step", 3, signalled(signal.SIGINT), 130, "SIGINT ended the run"),
    "a reward calls sys.exit": (Engine, "decode", 3, failing(SystemExit(0)), 2, "called sys.exit(0)"),
    "too little memory": (Engine, "decode", 3, failing(torch.OutOfMemoryError(NO_ROOM)), 2, f"{TOLD}: `duet plan` tells"),
    "a fault": (Engine, "decode", 3, failing(KeyError("gone")), 1, "KeyError: 'gone'"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "name"), [("ar", next(iter(ENDS))), *(("decoder", name) for name in ENDS)]
)
def test_an_end_leaves_the_last_finished_step(whole, stage, name, tmp_path, monkeypatch, capfd):
    owner, method, call, act, status, text = ENDS[name]
    with monkeypatch.context() as broken, pytest.raises(UserError) as ended:
        # the gate draws a picture before the first step
        in_step(broken, owner, method, call, act)
        train(make(stage, tmp_path))
    left = complete_checkpoints(tmp_path)
    assert len(left) == 1 and left[0].name in ("checkpoint-1", "checkpoint-2")
    assert ended.value.status == status and text in str(ended.value)
    assert f"{left[0]} is whole: go on from it with train.resume=latest" in str(ended.value)
    log = (tmp_path / "train.log").read_text()
    assert text in log and "Traceback" in log
    capfd.readouterr()
    assert_same(whole(stage), train(make(stage, tmp_path, "train.resume=latest")))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [1, 2, 3]


def test_what_fails_in_an_update_goes_back_to_the_newest_checkpoint(whole, tmp_path, monkeypatch):
    """An update of half a step is no step: its weights are never written."""
    told = "RuntimeError: CUDA error; no checkpoint was written yet: begin again"
    with monkeypatch.context() as broken, pytest.raises(UserError, match=told):
        # two updates a step: the second step's first one is made
        in_step(broken, Policy, "step", 4, failing(RuntimeError("CUDA error")))
        train(make("decoder", tmp_path))
    assert not list(tmp_path.glob("*checkpoint*"))
    assert_same(whole("decoder"), train(make("decoder", tmp_path, "train.resume=latest")))


def test_a_full_disk_leaves_no_partial_checkpoint(whole, tmp_path, monkeypatch):
    """Torch's writer raises a RuntimeError, others an OSError."""
    save = Policy.save

    def fills(self, folder):
        save(self, folder)
        if folder.name != ".checkpoint-1.partial":
            raise RuntimeError("unexpected pos 64 vs 0")

    told = (
        r"OSError: checkpoint-2 could not be written \(unexpected.*; \S*checkpoint-1 is whole: go"
    )
    with monkeypatch.context() as broken, pytest.raises(UserError, match=told):
        broken.setattr(Policy, "save", fills)
        train(make("decoder", tmp_path, "train.save_steps=1"))
    assert [p.name for p in tmp_path.glob("*checkpoint-*")] == ["checkpoint-1"]
    assert not list(tmp_path.glob(".checkpoint*"))
    assert_same(whole("decoder"), train(make("decoder", tmp_path, "train.resume=latest")))


@pytest.mark.parametrize("while_writing", [False, True])
def test_a_folder_that_is_gone_is_not_made_anew(whole, tmp_path, monkeypatch, while_writing):
    """As that of a disk that was unmounted is: half a checkpoint would stand there."""
    run, away = tmp_path / "run", tmp_path / "away"
    owner = Policy if while_writing else Endings  # whose writers make folders anew
    save = owner.save

    def vanishes(*given):
        if (run / "checkpoint-1").is_dir():
            run.rename(away)
            (run / "left").mkdir(parents=True)  # the place where it was mounted
        return save(*given)

    told = r"checkpoint-2 could not be written \(.*" + ("was gone" if while_writing else "is gone")
    with monkeypatch.context() as broken, pytest.raises(UserError, match=told):
        broken.setattr(owner, "save", vanishes)
        train(make("decoder", run, "train.save_steps=1"))
    assert not list(run.rglob("*checkpoint*"))
    shutil.rmtree(run)
    away.rename(run)
    assert_same(whole("decoder"), train(make("decoder", run, "train.resume=latest")))


def test_a_second_signal_ends_at_once_and_an_ignored_one_stays_so(tmp_path):
    """In a process of its own; what a launcher passes on within two seconds is the same signal."""
    code = """
import os, signal, sys, time
from duet.train.signals import Signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Signals().listening():
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    print("alive", flush=True)
    time.sleep(2.1)
    os.kill(os.getpid(), signal.SIGINT)
    print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stdout == "alive\n"
    assert done.stderr.count("duet: SIGINT: the run ends at the next safe place") == 1


@pytest.mark.parametrize("ended", [UserError("SIGUSR1 ended the run", 138), KeyError("gone"), torch.OutOfMemoryError(NO_ROOM)])  # fmt: skip
def test_what_ends_one_process_ends_the_others_with_its_status(monkeypatch, ended):
    told = []
    monkeypatch.setattr(together, "gather_object", lambda own: told.extend(own) or told)
    with pytest.raises(type(ended)), together.together(None):
        raise ended
    with pytest.raises(UserError, match="process 0 ended: ") as other, together.together(None):
        pass
    assert other.value.status == (138 if isinstance(ended, UserError) else 2)
    assert "Including" not in str(other.value), "torch's advice is long"


LESS = "take a smaller batch size, or a device with more memory"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a\nb"), 2, "duet: error: a b"),
        (UserError("stopped", 143), 143, "duet: error: stopped"),
        (KeyboardInterrupt(), 130, "duet: interrupted"),
        (torch.OutOfMemoryError(NO_ROOM), 2, f"duet: error: {TOLD}: {LESS}"),
        (MemoryError(), 2, f"duet: error: MemoryError: out of memory: {LESS}"),
    ],
)
def test_a_command_ends_with_one_line_and_its_status(error, status, line, capsys):
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(failing(error))
    assert ended.value.code == status and capsys.readouterr().err == line + "\n"


def test_a_cpus_memory_too_is_told_in_one_line(capsys):
    """For which torch has no class of its own."""
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(lambda: torch.empty(2**55))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and "can't allocate memory" in told and told.count("\n") == 1


def test_a_fault_of_the_code_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="CUDA error"):
        exit_on_user_error(failing(RuntimeError("CUDA error")))
