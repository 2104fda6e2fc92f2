"""Each engine over real processes: its update is that of one process, in parts, and goes on."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn import Linear
from torch.optim import SGD

from duet.train.tiny import engine_updates
from duet.train.tiny.engine_updates import go_on, write_rows
from duet.train.tiny.engines import MOMENTS_ALLOWED, compare, distance, moments
from duet.train.tiny.launcher import ENGINES
from duet.train.zero import Zero2, Zero3
from tests import forked
from tests.conftest import ROOT

# of each engine, and what each of two processes holds of the trained weights and of the
# optimizer's moments; the rest of the table is the script's
CASES = {
    "zero2": (["ar-lora-edits"], (1, 0.5)),
    "zero3": (["decoder-full-edits"], (0.5, 0.5)),
    "fsdp2": (["decoder-full-edits"], (0.5, 0.5)),
}

# a step of SGD in place of three, and half of the forwards
SMALL = (
    "grpo.num_iterations=1", "sampling.guidance_scale=1", "sampling.num_inference_steps=4",
    "sde.window_start_max=1",
)  # fmt: skip
UPDATES = "duet.train.tiny.engine_updates"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the cases, this one."""
    folder = tmp_path_factory.mktemp("engines") / "alone"
    write_rows(folder)
    cases = sorted({case for own, _ in CASES.values() for case in own})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        engine_updates.main([str(folder), str(folder), *cases, *SMALL])
    return folder


@pytest.mark.parametrize("engine", CASES)
def test_an_update_in_parts_is_that_of_one_process(engine, alone, tmp_path):
    """Also: unequal forwards hang nobody (glyphs of two lengths; no source, one, two), a run may
    begin on a checkpoint, a loss that is not finite on one process is skipped by all, a resume is
    exact, a hostile file is refused, and the names are those of one process."""
    (cases, parts), folder = CASES[engine], tmp_path / engine
    write_rows(folder)
    asked = (str(folder), str(alone), *cases, *SMALL)
    done = forked.run(UPDATES, *asked, processes=2, environment=ENGINES[engine])
    assert done.returncode == 0, done.stderr
    for case in cases:
        line = compare(engine, case, alone / case, folder / case)
        assert line.sound, line
        assert line.processes == 2
        assert line.began_empty == (engine != "zero2")
        assert (line.held, line.moments_held) == pytest.approx(parts, rel=0.01)
    AcceleratorState._reset_state(True)
    write_rows(tmp_path / "alone")
    for case in cases:  # one process alone goes on from what two had in parts
        output, adam = tmp_path / "alone" / case / "resumed", folder / case / "adam"
        go_on(case, adam / "checkpoint-1", output, *SMALL)
        ended, theirs = (moments(f / "checkpoint-2") for f in (output, adam))
        largest = max(float(value.abs().max()) for value in theirs.values())
        assert distance(ended, theirs) < MOMENTS_ALLOWED * largest


@pytest.fixture
def asked_of_deepspeed(monkeypatch):
    """The config that an engine gives it for a layer of 6 trained weights."""
    monkeypatch.setattr("deepspeed.initialize", lambda **given: (given["config"],))
    module = Linear(2, 3)
    module.bias.requires_grad_(False)

    def asked(engine: type[Zero2]) -> dict:
        zero = engine(SimpleNamespace(device=torch.device("cpu")), module, Linear)
        zero.prepare(SGD(zero.trained), None, 1.0)
        return zero.module["zero_optimization"]

    return asked


def test_zero_makes_room_for_no_more_gradients_than_there_are(asked_of_deepspeed):
    assert asked_of_deepspeed(Zero2)["reduce_bucket_size"] == 6


def test_zero3_begins_with_small_gradients(asked_of_deepspeed):
    """Its start makes a whole gradient, on every process, of each `sub_group_size` weights of its
    part: by DeepSpeed's own 1e9 it would be the AR's 36 GB."""
    assert asked_of_deepspeed(Zero3)["sub_group_size"] <= 1e7
