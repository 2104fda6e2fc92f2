"""Engine x stage x tuning x processes: does it work, is its update that of one process, is it
resumed to the bit, how long is a step?

    python -m duet.train.tiny.engines [--engines ddp zero2 zero3 fsdp2] [--processes 1 2 4]

Prints the table of configs/tiny/RESULTS.md. Each engine and number of processes is one launch on
this machine's CPU over gloo. Status 1 where something is not equal, or not resumed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from duet.inference.parts import PARTS
from duet.train.tiny.engine_updates import CASES, TINY, write_rows
from duet.train.tiny.launcher import ENGINES, launched, require_success

# in the largest change, beside the rounding of the weight itself. In float32 each step magnifies
# the rounding of the one before: the AR's forward is no surer than 1e-6, and ZeRO-3 has a linear
# layer of its own where blocks are not computed again. Float64 shows that it is that
WEIGHTS_ALLOWED = {"decoder": 1e-6, "ar": 1e-5}
ZERO3_ALLOWED = 1e-5
DOUBLE_ALLOWED = 1e-12
MOMENTS_ALLOWED = 1e-4  # in the largest
BFLOAT16_ALLOWED = 5e-2  # of both: it rounds 2**16 times as much


@dataclass(frozen=True)
class Line:
    """What came of one engine, case and number of processes."""

    engine: str
    case: str
    processes: int
    weights: float  # largest difference after three SGD steps, in the largest change
    double: float | None  # the same in float64; None: not run
    moments: float  # of Adam's first moments after a step, in the largest
    resumed: bool  # to the bit
    skipped: bool  # an update whose loss was not finite on one process
    refused: bool  # a file of the checkpoint that would run code
    autocast: bool  # an update's forwards run in their caller's
    began_empty: bool  # no process ever had all weights of the trained part
    held: float  # trained weights that a process holds
    moments_held: float
    seconds: float

    @property
    def sound(self) -> bool:
        allowed = WEIGHTS_ALLOWED[self.case.split("-")[0]]
        if self.engine == "zero3":
            allowed = ZERO3_ALLOWED
        moments = MOMENTS_ALLOWED
        if self.case.endswith("bf16"):
            allowed = moments = BFLOAT16_ALLOWED
        equal = (
            self.weights <= allowed
            and (self.double or 0) <= DOUBLE_ALLOWED
            and self.moments <= moments
        )
        return equal and self.resumed and self.skipped and self.refused and self.autocast

    def __str__(self) -> str:
        stage, tuning = self.case.split("-", 1)
        held = (self.resumed, self.skipped, self.refused, self.autocast)
        cells = [self.engine, stage, tuning, self.processes]
        apart = (self.weights, self.double, self.moments)
        cells += ["" if value is None else f"{value:.1e}" for value in apart]
        cells += ["yes" if true else "NO" for true in held]
        cells += [f"{self.held:.0%}", f"{self.moments_held:.0%}", f"{self.seconds:.1f}"]
        return f"| {' | '.join(map(str, cells))} |"


_COLUMNS = (
    *("engine", "stage", "tuning", "processes", "weights", "in float64", "moments"),
    *("resumed", "skipped", "refused", "autocast", "held", "moments held", "seconds"),
)
HEAD = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"


def launch(
    engine: str, processes: int, folder: Path, begun: Path, *cases: str, double: bool = False
) -> None:
    """`begun`: the folder of the launch on whose checkpoints the SGD runs begin, or `folder`;
    `double`: with runs in float64.

    Raises CalledProcessError where a run ends before its last step.
    """
    write_rows(folder)
    asked = (str(folder), str(begun), *cases, *(["--double"] if double else []))
    require_success(launched(engine, processes, "duet.train.tiny.engine_updates", *asked))


def compare(engine: str, case: str, alone: Path, folder: Path) -> Line:
    """Of what a launch wrote in `folder`; `alone`: what one process did."""
    told = json.loads((folder / "measured.json").read_text())
    one = json.loads((alone / "measured.json").read_text())
    assert told["engine"] == engine
    double = None
    if (folder / "double").is_dir():
        double = _apart(_fresh(case, alone), alone / "double", folder / "double")
    begun = weights(alone / "adam" / "checkpoint-1")
    first, mine = (moments(f / "adam" / "checkpoint-1") for f in (alone, folder))
    whole, resumed = (folder / name / "checkpoint-2" for name in ("adam", "resumed"))
    return Line(
        engine,
        case,
        told["processes"],
        _apart(begun, alone / "sgd", folder / "sgd"),
        double,
        distance(first, mine) / max(map(_largest, first.values())),
        distance(weights(whole), weights(resumed)) == 0
        and distance(moments(whole), moments(resumed)) == 0,
        told["skipped"],
        told["refused"],
        told["autocast"],
        told["began_empty"],
        told["weights"] / one["weights"],
        told["moments"] / one["moments"],
        told["seconds"],
    )


def _apart(before: dict[str, Tensor], alone: Path, folder: Path) -> float:
    """What two runs made of the weights `before`: their largest difference, in the first one's
    largest change."""
    one, other = (weights(run / "checkpoint-1") for run in (alone, folder))
    moved = max(_largest(one[name] - before[name]) for name in before)
    return max(map(_largest, _beyond_rounding(one, other))) / moved


def _fresh(case: str, alone: Path) -> dict[str, Tensor]:
    """What moves, as it began without a checkpoint: a fresh adapter's B is 0."""
    stage, tuning, *_ = case.split("-")
    if tuning == "lora":
        names = weights(alone / "double" / "checkpoint-1")
        return {n: torch.zeros_like(v) for n, v in names.items() if ".lora_B." in n}
    return _files(TINY / "model" / PARTS[stage].component)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    [folder] = [checkpoint / n for n in ("adapter", "weights") if (checkpoint / n).is_dir()]
    return _files(folder)


def _files(folder: Path) -> dict[str, Tensor]:
    return {n: v for f in folder.glob("*.safetensors") for n, v in load_file(f).items()}


def moments(checkpoint: Path) -> dict[int, Tensor]:
    state = torch.load(checkpoint / "state" / "optimizer.bin", weights_only=True)["state"]
    return {i: own["exp_avg"] for i, own in state.items()}


def _beyond_rounding(one: dict[str, Tensor], other: dict[str, Tensor]) -> Iterator[Tensor]:
    """How far weights are apart after three steps, each of which rounds them on both sides."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        rounding = 3 * torch.finfo(value.dtype).eps * value.abs()
        yield ((value - other[name]).abs() - rounding).clamp(min=0)


def _largest(value: Tensor) -> float:
    return float(value.abs().max())


def distance(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(_largest(value - other[name]) for name, value in one.items())


def lines(engines: Sequence[str], processes: Sequence[int], folder: Path) -> Iterator[Line]:
    alone = folder / "alone"
    launch("ddp", 1, alone, alone, double=True)
    for engine in engines:
        for count in processes:
            own = folder / f"{engine}-{count}"
            launch(engine, count, own, alone, double=True)
            for case in CASES:
                yield compare(engine, case, alone / case, own / case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    options = parser.parse_args()
    print(HEAD, flush=True)
    sound = True
    with tempfile.TemporaryDirectory() as folder:
        for line in lines(options.engines, options.processes, Path(folder)):
            print(line, flush=True)
            sound &= line.sound
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
