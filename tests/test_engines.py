"""Each engine over real processes: its update is that of one process, in parts, and goes on."""

import pytest
from accelerate.state import AcceleratorState

from duet.train.tiny.engine_updates import go_on
from duet.train.tiny.engines import MOMENTS_ALLOWED, compare, distance, launch, moments

CASES = ("decoder-full", "ar-lora")
# what each of two processes holds of the trained weights and of the optimizer's moments
PARTS = {"zero2": (1, 0.5), "zero3": (0.5, 0.5), "fsdp2": (0.5, 0.5)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "alone"
    launch("ddp", 1, folder, CASES)
    return folder


@pytest.mark.parametrize("engine", PARTS)
def test_an_update_in_parts_is_that_of_one_process(engine, alone, tmp_path):
    """Also: unequal forwards hang nobody, a loss that is not finite on one process is skipped by
    all, a resume is exact, a hostile file is refused, and the names are those of one process."""
    folder = tmp_path / engine
    launch(engine, 2, folder, CASES)
    for case in CASES:
        line = compare(engine, case, alone / case, folder / case)
        assert line.sound, line
        assert line.processes == 2
        assert (line.held, line.moments_held) == pytest.approx(PARTS[engine], rel=0.01)
    AcceleratorState._reset_state(True)
    for case in CASES:  # one process alone goes on from what two had in parts
        go_on(case, folder / case / "adam" / "checkpoint-1", tmp_path / case)
        ended, theirs = (
            moments(f / "checkpoint-2") for f in (tmp_path / case, folder / case / "adam")
        )
        largest = max(float(value.abs().max()) for value in theirs.values())
        assert distance(ended, theirs) < MOMENTS_ALLOWED * largest
