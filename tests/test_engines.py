"""Each engine over real processes: its update is that of one process, in parts, and goes on."""

import pytest
from accelerate.state import AcceleratorState

from duet.train.tiny.engine_updates import go_on, write_rows
from duet.train.tiny.engines import MOMENTS_ALLOWED, compare, distance, launch, moments

# of each engine, and what each of two processes holds of the trained weights and of the
# optimizer's moments; the rest of the table is the script's
CASES = {
    "zero2": (["ar-lora"], (1, 0.5)),
    "zero3": (["decoder-full-edits"], (0.5, 0.5)),
    "fsdp2": (["decoder-full-edits"], (0.5, 0.5)),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "alone"
    launch("ddp", 1, folder, folder, *sorted({c for own, _ in CASES.values() for c in own}))
    return folder


@pytest.mark.parametrize("engine", CASES)
def test_an_update_in_parts_is_that_of_one_process(engine, alone, tmp_path):
    """Also: unequal forwards hang nobody (glyphs of two lengths; no source, one, two), a run may
    begin on a checkpoint, a loss that is not finite on one process is skipped by all, a resume is
    exact, a hostile file is refused, and the names are those of one process."""
    (cases, parts), folder = CASES[engine], tmp_path / engine
    launch(engine, 2, folder, alone, *cases)
    for case in cases:
        line = compare(engine, case, alone / case, folder / case)
        assert line.sound, line
        assert line.processes == 2
        assert (line.held, line.moments_held) == pytest.approx(parts, rel=0.01)
    AcceleratorState._reset_state(True)
    write_rows(tmp_path / "alone")
    for case in cases:  # one process alone goes on from what two had in parts
        output, adam = tmp_path / "alone" / case / "resumed", folder / case / "adam"
        go_on(case, adam / "checkpoint-1", output)
        ended, theirs = (moments(f / "checkpoint-2") for f in (output, adam))
        largest = max(float(value.abs().max()) for value in theirs.values())
        assert distance(ended, theirs) < MOMENTS_ALLOWED * largest
