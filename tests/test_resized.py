"""Another number of processes than before: what is told, refused, and goes on."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState

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


def process(rank: int) -> SimpleNamespace:
    return SimpleNamespace(process_index=rank, scaler=None)


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


def test_a_process_has_the_state_of_its_own_gpu_alone(tmp_path, monkeypatch):
    """Process 5 drew on GPU 1 of a machine's 4 and goes on with GPU 5 of 8; a file by accelerate
    itself has the states of all 4."""
    PartialState(cpu=True)
    held = {}  # by GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": held[device])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device="cuda": held.update({device: state})
    )
    own = torch.tensor([1, 2, 3], dtype=torch.uint8)
    held["cuda"] = own
    save_state(process(5), [], tmp_path)
    file = tmp_path / "state" / "random_states_5.pkl"
    for saved in (None, [own * 0, own, own * 0, own * 0]):
        if saved is not None:
            states = torch.load(file, weights_only=False)
            torch.save(states | {"torch_cuda_manual_seed": saved}, file)
        held.clear()
        load_state(process(5), [], tmp_path)
        assert held.keys() == {"cuda"} and torch.equal(held["cuda"], own), "nobody else's"


def test_a_random_state_that_cannot_be_read_is_told(tmp_path):
    save_state(process(0), [], tmp_path)
    torch.save({"step": 0}, tmp_path / "state" / "random_states_0.pkl")
    with pytest.raises(UserError, match="is damaged"):
        load_state(process(0), [], tmp_path)


def test_a_damaged_state_is_told_by_new_processes_too(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(UserError, match="is damaged"):
        load_state(process(2), [], tmp_path)
