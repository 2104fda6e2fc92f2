"""Damaged checkpoints, foreign ones, and two runs in one output folder."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duet.configs.digests import SUMS, Damaged, write_digests
from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.train.checkpoint import complete_checkpoints, read_position, save_checkpoint
from duet.train.lock import locked
from duet.train.resume import find_start
from tests.conftest import ROOT, SHORT, train

SMALL = [
    *SHORT,
    "rollout.prompts_per_step=1",
    "rollout.num_generations=2",
    "optim.per_device_train_batch_size=2",
    "optim.gradient_accumulation_steps=1",
    "sampling.num_inference_steps=6",
    "train.trackers=[]",
    "train.save_steps=1",
    "train.max_steps=2",
]
FILES = [
    "SHA256SUMS",
    "trainer_state.json",
    "state/optimizer.bin",
    "state/scheduler.bin",
    "state/random_states_0.pkl",
    "adapter/SHA256SUMS",
    "adapter/duet_adapter.json",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
]


def config_of(run: Path, *overrides: str, stage: str = "ar"):
    path = ROOT / "configs" / "tiny" / f"{stage}.yaml"
    return load_config(path, [*SMALL, f"output_dir={run}", *overrides])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of the AR with checkpoints 1 and 2."""
    run = tmp_path_factory.mktemp("made") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train(config_of(run))
    return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def start(run: Path, *overrides: str, **changed):
    """Where the run would go on, as a run of the same inputs finds it."""
    inputs = read_position(run / "checkpoint-1").inputs
    config = config_of(run, "train.resume=latest", *overrides)
    return find_start(config, 1, replace(inputs, **changed))


def flip(path: Path, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def edit(**changed):
    """A changed trainer_state.json."""

    def damage(checkpoint: Path) -> None:
        path = checkpoint / "trainer_state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return damage


def on(name: str, damage):
    return lambda checkpoint: damage(checkpoint / name)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone")


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap(name: str):
    return lambda c: shutil.copy(c.with_name("checkpoint-1") / name, c / name)


def resum(damage):
    """The damage, and then digests that agree with it: what stands there must agree with itself."""

    def both(checkpoint: Path) -> None:
        damage(checkpoint)
        write_digests(checkpoint)

    return both


def cut_last_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def replace_checkpoint(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("checkpoint-1"), checkpoint)


DAMAGES = {
    **{f"flip {n}": on(n, flip) for n in FILES},
    **{f"flip the end of {n}": on(n, lambda p: flip(p, 1.0)) for n in FILES[1:5] + FILES[8:]},
    **{f"truncate {n}": on(n, lambda p: os.truncate(p, p.stat().st_size // 2)) for n in FILES},
    **{f"empty {n}": on(n, lambda p: p.write_bytes(b"")) for n in FILES},
    **{f"remove {n}": on(n, Path.unlink) for n in FILES},
    **{f"a folder for {n}": on(n, become_folder) for n in (FILES[0], FILES[1], FILES[2])},
    "a dangling link": on("state/optimizer.bin", dangle),
    "a pipe": on("state/scheduler.bin", become_pipe),
    "a list without its last line": on(SUMS, cut_last_line),
    "no state": lambda c: shutil.rmtree(c / "state"),
    "no adapter": lambda c: shutil.rmtree(c / "adapter"),
    "nothing": lambda c: (shutil.rmtree(c), c.mkdir()),
    "a file of its name": lambda c: (shutil.rmtree(c), c.write_text("")),
    "another step's optimizer": swap("state/optimizer.bin"),
    "another step's adapter": swap("adapter/adapter_model.safetensors"),
    "another step's position": swap("trainer_state.json"),
    "another step's list": swap(SUMS),
    "another step's folder": replace_checkpoint,
    "step": edit(step=1),
    "stage": edit(stage="decoder"),
    "processes": edit(num_processes=2),
    "run": edit(run_id="x"),
    "step, digests too": resum(edit(step=1)),
    "step of a wrong type": resum(edit(step="2")),
    "an unknown key": resum(edit(steps=2)),
    "no inputs": resum(edit(inputs={})),
    "a list for a position": resum(on("trainer_state.json", lambda p: p.write_text("[]"))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_is_told_and_the_one_before_taken(run, damage, capsys):
    """And where it is the only one, the run does not begin at step 0."""
    damage(run / "checkpoint-2")
    found = start(run)
    assert (found.checkpoint, found.step) == (run / "checkpoint-1", 1)
    [line] = capsys.readouterr().err.splitlines()
    assert "checkpoint-2' is damaged (" in line and "goes on from checkpoint-1" in line
    with pytest.raises(Damaged, match="checkpoint-2' is damaged"):
        start(run, f"train.resume={run / 'checkpoint-2'}")
    with pytest.raises(UserError, match="holds checkpoint-2 already"):
        start(run, "train.resume=null")
    inputs = read_position(run / "checkpoint-1").inputs
    shutil.rmtree(run / "checkpoint-1")
    with pytest.raises(UserError, match="no checkpoint is whole: .*damaged"):
        find_start(config_of(run, "train.resume=latest"), 1, inputs)


def test_there_are_sixty_damages():
    assert len(DAMAGES) >= 60


@pytest.mark.parametrize("name", FILES)
def test_the_damaged_file_is_named(run, name):
    (run / "checkpoint-2" / name).unlink()
    with pytest.raises(Damaged, match=Path(name).name):
        read_position(run / "checkpoint-2")


def test_what_a_user_puts_beside_the_files_does_no_harm(run, capsys):
    newest = run / "checkpoint-2"
    (newest / "notes.txt").write_text("the good one")
    (newest / "adapter" / "a.safetensors").write_text("another")
    (newest / "state" / "model.safetensors").write_text("another")
    aside = run.with_name("elsewhere")
    shutil.move(newest, aside / "checkpoint-2")
    newest.symlink_to(aside / "checkpoint-2")
    assert start(run).step == 2 and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sampling.top_p=0.5", "sampling.top_p = 0.5, but checkpoint .* with 0.9"),
        ("sde.noise_level=0.1", "sde.noise_level = 0.1, but"),
        ("lora.alpha=1", "lora.alpha = 1.0, but"),
        ("optim.learning_rate=1", "optim.learning_rate = 1.0, but"),
    ],
)
def test_another_setting_does_not_resume(run, override, told):
    with pytest.raises(UserError, match=told):
        start(run, override)


def test_other_weights_or_rows_do_not_resume(run):
    inputs = read_position(run / "checkpoint-2").inputs
    for part in inputs.model:
        with pytest.raises(UserError, match=f"has another {part} than checkpoint"):
            start(run, model=inputs.model | {part: "x"})
    with pytest.raises(UserError, match="data.train = .* has other rows than checkpoint"):
        start(run, data="x")
    rows = run.with_name("rows.jsonl")
    rows.write_text('{"prompt": "a card"}\n')
    with pytest.raises(UserError, match="has other rows"):
        train(config_of(run, "train.resume=latest", "train.max_steps=3", f"data.train={rows}"))


def test_what_may_change_is_told(run, capsys):
    assert start(run, "grpo.beta=0.5", "train.max_steps=9").step == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "grpo.beta 0.0 -> 0.5" in line and "train.max_steps 2 -> 9" in line
    assert start(run, "train.save_steps=7").step == 2 and not capsys.readouterr().err


def test_an_older_duets_checkpoint_is_called_so(run):
    for checkpoint in complete_checkpoints(run):
        (checkpoint / SUMS).unlink()
        told = json.loads((checkpoint / "trainer_state.json").read_text())
        del told["run_id"], told["inputs"]
        (checkpoint / "trainer_state.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="written by an older Duet, without digests"):
        find_start(config_of(run, "train.resume=latest"), 1, None)


def test_a_checkpoint_is_not_ones_own_by_its_number(run, made, monkeypatch):
    """Another run's is refused; one's own damaged one is moved aside, and written anew."""
    theirs = run / "checkpoint-3"
    found = start(run)

    def overtaken(*args, **kwargs):
        shutil.copytree(run / "checkpoint-2", theirs)
        edit(step=3, run_id="theirs")(theirs)
        write_digests(theirs)
        return save_checkpoint(*args, **kwargs)

    config = config_of(run, "train.resume=latest", "train.max_steps=3")
    with monkeypatch.context() as patch:
        patch.setattr("duet.train.endings.save_checkpoint", overtaken)
        with pytest.raises(UserError, match="checkpoint-3' is another run's"):
            train(config)
    assert read_position(theirs).run_id == "theirs"
    flip(theirs / "state" / "optimizer.bin")
    assert train(config) == theirs
    assert read_position(theirs).run_id == found.run_id
    assert (run / "checkpoint-3.damaged-1" / "state" / "optimizer.bin").is_file()
    assert find_start(config, 1, found.inputs).step == 3, "what was moved aside is none"


class Payload:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("write", [lambda o, p: p.write_bytes(pickle.dumps(o)), torch.save])
def test_no_pickle_runs_code(run, name, write, tmp_path):
    """Digests do not keep out who writes them anew."""
    newest, proof = run / "checkpoint-2", tmp_path / "ran"
    write(Payload(proof), newest / "state" / name)
    write_digests(newest)
    with pytest.raises(UserError, match="is damaged"):
        train(config_of(run, "train.resume=latest", "train.max_steps=3"))
    assert not proof.exists() and not (run / "checkpoint-3").exists()


def test_files_are_on_the_disk_before_the_name_is(made, tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(
        "os.fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd)
    )
    monkeypatch.setattr(Path, "rename", lambda p, to: events.append("rename") or rename(p, to))
    train(config_of(tmp_path / "new", "train.max_steps=1"))
    at = events.index("rename")
    synced = {Path(e).name for e in events[:at]}
    assert {Path(name).name for name in FILES} | {"adapter", "state"} <= synced
    assert ".checkpoint-1.partial" in synced
    assert events[at + 1] == str(tmp_path / "new"), "the new name itself"


HOLD = """
import sys, time
from pathlib import Path
from duet.train.lock import locked
with locked("output_dir", Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_while_the_first_lives(run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    held = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    assert held.stdout.readline() == "held\n"
    config = config_of(run, "train.resume=latest", "train.max_steps=3")
    with pytest.raises(UserError, match=f"in use by process {held.pid} on .*: wait for its end"):
        train(config)
    assert before == {p: p.read_bytes() for p in before}, "nothing is touched"
    held.send_signal(signal.SIGKILL)
    held.wait()
    assert train(config) == run / "checkpoint-3", "a dead process holds nothing"


@pytest.mark.parametrize("ending", [UserError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_the_lock_ends_with_its_run(tmp_path, ending):
    for _ in range(2):
        with pytest.raises(type(ending)), locked("output_dir", tmp_path / "run"):
            with pytest.raises(UserError, match="in use by process"):
                locked("output_dir", tmp_path / "run").__enter__()
            raise ending
