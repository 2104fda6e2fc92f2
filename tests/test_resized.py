"""Another number of processes than before: what is told, refused, and goes on."""

import json
import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from torch.amp import GradScaler

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.train.randomness import RandomState, unmoved
from duet.train.resized import what_changes
from duet.train.state import load_state, save_state
from tests.conftest import ROOT

FOUR = "optim.per_device_train_batch_size=4"


def tree(*overrides: str, stage: str = "decoder") -> dict:
    """As a checkpoint holds it."""
    config = load_config(ROOT / "configs" / "tiny" / f"{stage}.yaml", [FOUR, *overrides])
    return json.loads(json.dumps(asdict(config)))


TWICE, CONSTANT = "optim.gradient_accumulation_steps=2", "optim.lr_scheduler_type=constant"


@pytest.mark.parametrize(
    ("before", "now", "stage", "told", "not_told"),
    [
        ((1, TWICE), (2,), "decoder", "of the new processes begin anew", "instead of"),
        ((2,), (1, TWICE), "decoder", "are gone are lost", "instead of"),
        ((1, CONSTANT), (2, CONSTANT), "decoder", "decoder has 8 samples instead of 4", "lost"),
        ((1, TWICE, CONSTANT), (2, CONSTANT), "ar", "begin anew", "instead of"),
    ],
)
def test_what_is_not_exact_is_told_in_one_line(before, now, stage, told, not_told):
    (was, *then), (processes, *asked) = before, now
    line = what_changes(tree(*then, stage=stage), was, tree(*asked, stage=stage), processes)
    assert line.startswith(f"goes on over {processes} processes, trained so far over {was}: ")
    assert told in line and not_told not in line and "\n" not in line


@pytest.mark.parametrize(
    ("now", "stage", "way"),
    [
        ((4,), "decoder", "16 samples over 4 processes and had 4.*accumulation_steps = 1$"),
        ((3,), "decoder", "12 samples over 3 processes.*processes that divides 4$"),
        ((2, CONSTANT, "optim.warmup_steps=3"), "decoder", "steps = 2$"),
        ((2, CONSTANT, "optim.warmup_ratio=0.1"), "decoder", "steps = 2$"),
        ((2,), "both", "an update of decoder has 64 samples over 2 processes and had 32"),
    ],
)
def test_a_schedule_that_counts_updates_keeps_their_size(now, stage, way):
    processes, *asked = now
    with pytest.raises(UserError, match=way):
        what_changes(tree(stage=stage), 1, tree(*asked, stage=stage), processes)


def process(rank: int, scaler: GradScaler | None = None) -> SimpleNamespace:
    return SimpleNamespace(process_index=rank, local_process_index=rank % 4, scaler=scaler)


def test_new_processes_have_random_states_of_their_own(tmp_path):
    """Two files, four processes: what each draws next is nobody else's, and again the same."""

    def drawn(rank: int) -> tuple:
        with unmoved():
            load_state(process(rank), [], tmp_path)
            now = RandomState.now()
            return now.python, float(torch.rand(())), str(now.numpy)

    for rank in range(2):
        with unmoved():
            torch.manual_seed(rank)
            save_state(process(rank), [], tmp_path)
    of_all = [drawn(rank) for rank in range(4)]
    assert len({values for _, values, _ in of_all}) == 4
    for third in of_all[2:]:
        assert all(a != b for a, b in zip(third, of_all[0], strict=True))
    assert of_all[2][0] != of_all[3][0] and drawn(2) == of_all[2]


def test_a_process_has_the_state_of_its_own_gpu_whichever_it_is(tmp_path, monkeypatch):
    """Process 5 drew on GPU 1 of a machine's 4 and goes on with GPU 5 of 8, a reward of its on
    GPU 0 of either; a file by accelerate itself does not say whose is whose."""
    PartialState(cpu=True)
    held, own = {gpu: torch.tensor([gpu], dtype=torch.uint8) for gpu in range(4)}, 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: own)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(held.values()))
    monkeypatch.setattr(
        torch.cuda,
        "set_rng_state",
        lambda state, gpu=None: held.update({own if gpu is None else gpu: state}),
    )
    save_state(process(5), [], tmp_path)
    file = tmp_path / "state" / "random_states_5.pkl"
    states = torch.load(file, weights_only=False)
    own = 5
    for saved in (states, {n: v for n, v in states.items() if n != "gpu"}):
        torch.save(saved, file)
        held.clear()
        load_state(process(5), [], tmp_path)
        assert {gpu: int(state) for gpu, state in held.items()} == {0: 0, 1: 1, 2: 2, 3: 3, 5: 1}


def test_a_scaler_goes_on_with_its_scale(tmp_path):
    PartialState(cpu=True)
    save_state(process(0, GradScaler("cpu", init_scale=8.0)), [], tmp_path)
    fresh = GradScaler("cpu")
    load_state(process(0, fresh), [], tmp_path)
    assert fresh.get_scale() == 8


def test_a_random_state_that_cannot_be_read_is_told(tmp_path):
    PartialState(cpu=True)
    save_state(process(0), [], tmp_path)
    torch.save({"step": 0}, tmp_path / "state" / "random_states_0.pkl")
    with pytest.raises(UserError, match="is damaged"):
        load_state(process(0), [], tmp_path)


@pytest.mark.parametrize("left", [None, 100])
def test_a_damaged_state_is_told_by_new_processes_too(left, tmp_path):
    PartialState(cpu=True)
    save_state(process(0), [], tmp_path)
    file = tmp_path / "state" / "random_states_0.pkl"
    if left is None:
        file.unlink()
    else:
        os.truncate(file, left)
    with pytest.raises(UserError, match="is damaged"):
        load_state(process(2), [], tmp_path)
