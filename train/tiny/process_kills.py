"""Kill one process of a small run in several, go on, and compare with the run that nothing ended.

    python -m duet.train.tiny.process_kills [--engines ddp fsdp2] [--processes 2] [--kills 10]

SIGKILL comes to one process, in turn to each, in a rollout, in scoring, in an update (before a
backward pass, and before the optimizer's step) and while a checkpoint is written (before the
weights, and before the optimizer's state): 10 points an engine with two processes. The others must
end by themselves. Prints a row a kill, with the seconds from it to the end of all; status 1 where
a run that goes on ends in other weights or moments of the optimizer, or one hangs.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from duet.inference.engine import Engine
from duet.train import __main__ as command
from duet.train import checkpoint
from duet.train.checkpoint import complete_checkpoints
from duet.train.metrics import read_metrics
from duet.train.policy import Policy
from duet.train.scoring import Scorer
from duet.train.tiny.engines import ENGINES
from duet.train.tiny.kills import SMALL, STEPS, before_call, same

_ROOT = Path(__file__).resolve().parents[2]
_SAVE_STEPS = STEPS // 2
_LAST = f"checkpoint-{STEPS}"
_MOMENT = "KILLED_AT"  # names the file that is made at the moment of the kill
ALLOWED_SECONDS = 60  # from a kill to the end of all
# the method that is called in each phase, and its call in the last step, or the last checkpoint
POINTS = {
    "rollout": (Engine, "decode", 1 + STEPS),  # the gate has one
    "scoring": (Scorer, "__call__", STEPS),
    "update": (Policy, "step", 2 * STEPS),
    "saving weights": (Policy, "save", 2),
    "saving moments": (checkpoint, "save_state", 2),
}


@dataclass(frozen=True)
class Kill:
    point: str
    rank: int
    signal: str = "SIGKILL"


@dataclass(frozen=True)
class Row:
    """What came of a kill."""

    engine: str
    kill: Kill
    seconds: float  # from the kill to the end of all processes
    left: str  # the newest checkpoint
    told: list[str]  # by the processes that were left
    same: bool  # of the run that goes on: weights, moments and steps

    @property
    def sound(self) -> bool:
        return self.same and self.seconds <= ALLOWED_SECONDS and len(self.told) == 1

    def __str__(self) -> str:
        told = self.told[0] if len(self.told) == 1 else f"{len(self.told)} LINES"
        return (
            f"| {self.engine} | {self.kill.point} | {self.kill.rank} | {self.seconds:.1f} | "
            f"{self.left} | {'yes' if self.same else 'NO'} | {told} |"
        )


HEAD = (
    "| engine | killed in | process | seconds to the end | left | the same to the bit | told |\n"
    "|---|---|---|---|---|---|---|"
)


def kills(processes: int) -> Iterator[Kill]:
    """Every point, and then again on the other processes."""
    for turn in range(processes):
        for number, point in enumerate(POINTS):
            yield Kill(point, (turn + number) % processes)


def start(
    engine: str, processes: int, folder: Path, kill: Kill | None = None, *overrides: str
) -> subprocess.Popen:
    """The run over processes of this machine's CPU, one of which may kill itself."""
    child = [] if kill is None else [kill.point, str(kill.rank), kill.signal]
    entry = ["duet.train.tiny.process_kills", "--child", *child] if child else ["duet.train"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    small = [*SMALL, f"train.save_steps={_SAVE_STEPS}", f"output_dir={folder}", *overrides]
    config = _ROOT / "configs" / "tiny" / "decoder.yaml"
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", _MOMENT: str(_moment(folder))}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", *entry, str(config), *small],
        cwd=_ROOT,
        env=os.environ | own | ENGINES[engine],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _moment(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.moment")


def attempt(engine: str, processes: int, folder: Path, whole: Path, kill: Kill) -> Row:
    """One kill and one run that goes on."""
    shutil.rmtree(folder, ignore_errors=True)
    _moment(folder).unlink(missing_ok=True)
    _, errors = start(engine, processes, folder, kill).communicate()
    seconds = time.time() - _moment(folder).stat().st_mtime
    newest = complete_checkpoints(folder)[-1].name
    on = start(engine, processes, folder, None, "train.resume=latest")
    failed = on.communicate()[1] if on.wait() else ""
    sys.stderr.write(failed)
    done = [s["step"] for s in read_metrics(folder)] == list(range(1, STEPS + 1))
    held = on.returncode == 0 and done and newest != _LAST and same(whole, folder / _LAST)
    told = [line for line in errors.splitlines() if "duet: error:" in line]
    if os.environ.get("SHOW"):
        sys.stderr.write(errors)
    return Row(engine, kill, seconds, newest, told, held)


def references(engine: str, processes: int, folder: Path) -> Path:
    """The run that nothing ends, twice: what chance makes of it must be nothing."""
    for name in ("whole", "again"):
        shutil.rmtree(folder / name, ignore_errors=True)
        run = start(engine, processes, folder / name)
        _, errors = run.communicate()
        if run.returncode:
            sys.exit(f"the {engine} run fails without a kill:\n{errors}")
    if not same(folder / "whole" / _LAST, folder / "again" / _LAST):
        sys.exit(f"two {engine} runs that nothing ended differ")
    return folder / "whole" / _LAST


def be_killed(point: str, rank: str, name: str, run: list[str]) -> None:
    """`duet train`, which a process of it does not survive."""

    def kill() -> None:
        Path(os.environ[_MOMENT]).touch()
        os.kill(os.getpid(), signal.Signals[name])

    if os.environ["RANK"] == rank:
        before_call(*POINTS[point], kill)
    command.main(run)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2"], choices=ENGINES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10, help="an engine")
    parser.add_argument("--folder", type=Path, default=Path("runs/process_kills"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options, run = parser.parse_known_args(arguments)
    if options.child:
        return be_killed(*options.child, run)
    print(HEAD, flush=True)
    rows: list[Row] = []
    for engine in options.engines:
        folder = options.folder.resolve() / engine
        folder.mkdir(parents=True, exist_ok=True)
        whole = references(engine, options.processes, folder)
        for kill in islice(cycle(kills(options.processes)), options.kills):
            rows.append(attempt(engine, options.processes, folder / "killed", whole, kill))
            print(rows[-1], flush=True)
    print(f"{sum(row.sound for row in rows)} of {len(rows)} the same to the bit")
    sys.exit(not all(row.sound for row in rows))


if __name__ == "__main__":
    from duet.configs.errors import exit_on_user_error

    exit_on_user_error(main)
