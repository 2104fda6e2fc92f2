"""Another number of processes than before: what is told, refused, and goes on."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.train.randomness import RandomState, unmoved
from duet.train.resized import what_changes
from duet.train.state import load_state
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


def test_new_processes_have_random_states_of_their_own(tmp_path):
    """Two files, four processes: what each draws next is nobody else's, and again the same."""
    (tmp_path / "state").mkdir()
    for rank in range(2):
        torch.save({"rank": rank}, tmp_path / "state" / f"random_states_{rank}.pkl")

    def drawn(rank: int) -> tuple:
        fake = SimpleNamespace(process_index=rank, scaler=None)
        with unmoved():
            load_state(fake, [], tmp_path)
            now = RandomState.now()
            return now.python, float(torch.rand(())), str(now.numpy)

    before = drawn(0)
    assert before == drawn(1), "files that hold no state leave what there is"
    third, fourth = drawn(2), drawn(3)
    assert all(a != b for a, b in zip(third, fourth, strict=True))
    assert all(a != b for a, b in zip(third, before, strict=True))
    assert drawn(2) == third


def test_a_damaged_state_is_told_by_new_processes_too(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(UserError, match="is damaged"):
        load_state(SimpleNamespace(process_index=2, scaler=None), [], tmp_path)
