"""Kill a small run in several processes again and again: does it go on to the bit?

    python -m duet.train.tiny.process_kills [--engines ddp fsdp2] [--processes 2] [--kills 10]

SIGKILL comes to one process, in turn to each, in a rollout, in scoring, in an update and while a
checkpoint is written (before the weights, and before the optimizer's state): 10 points an engine
with two processes. The others must end by themselves, with a line. The run goes on from what is
left, makes a step and its checkpoint, which must be that of a run that nothing ended, and is
killed in the step after it. Prints a row a kill, with the seconds from it to the end of all;
status 1 where a checkpoint differs or a process hangs. Other ends: --signal SIGSTOP (a process
that hangs), SIGTERM, SIGUSR1, and ENOSPC (a disk that is full when the main process writes).
"""

import argparse
import errno
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
from duet.train import checkpoint, state
from duet.train.checkpoint import complete_checkpoints
from duet.train.metrics import read_metrics
from duet.train.policy import Policy
from duet.train.scoring import Scorer
from duet.train.tiny.engines import ENGINES
from duet.train.tiny.kills import SMALL, before_call, same
from duet.train.tuning import Lora

_ROOT = Path(__file__).resolve().parents[2]
_MOMENT = "KILLED_AT"  # names the file that is made at the moment of the kill
_TIMEOUT = 15  # train.ddp_timeout; more than processes are apart on a busy machine
ALLOWED_SECONDS = 60  # from a kill to the end of all: torchrun kills who hangs after 30
# the method that is called in each phase, and its call in a start's second step
POINTS = {
    "rollout": (Engine, "decode", 3),  # the gate has one
    "scoring": (Scorer, "__call__", 2),
    "update": (Policy, "step", 4),
    "saving weights": (Policy, "save", 2),
    "saving moments": (checkpoint, "save_state", 2),
}
_WRITES = {"writing weights": (Lora, "write", 2), "writing moments": (state, "save", 2)}
_FATAL = ("SIGKILL", "SIGSTOP")
_ENDS = (*_FATAL, "SIGTERM", "SIGUSR1", "ENOSPC")


@dataclass(frozen=True)
class Kill:
    point: str
    rank: int
    end: str


@dataclass(frozen=True)
class Ended:
    """A start that was ended."""

    kill: Kill
    seconds: float  # from the kill to the end of all processes
    left: str  # the newest checkpoint
    told: list[str]  # by the processes that were left


HEAD = (
    "| engine | end | in | process | seconds to the end | left | goes on to the bit | told |\n"
    "|---|---|---|---|---|---|---|---|"
)


def kills(end: str, processes: int) -> Iterator[Kill]:
    """Every point, and then again on the other processes; only the main one writes."""
    if end == "ENOSPC":
        yield from (Kill(point, 0, end) for point in _WRITES)
        return
    for turn in range(processes):
        for number, point in enumerate(POINTS):
            yield Kill(point, (turn + number) % processes, end)


def start(
    engine: str, processes: int, folder: Path, steps: int, kill: Kill | None = None
) -> tuple[int, str]:
    """The run from its newest checkpoint over processes of this machine's CPU, one of which may
    end itself: the status, and what was told."""
    entry = ["duet.train"]
    if kill is not None:
        entry = ["duet.train.tiny.process_kills", "--child", kill.point, str(kill.rank), kill.end]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    small = [*SMALL, f"train.max_steps={steps}", "train.save_steps=1", "train.resume=latest"]
    small += [f"train.ddp_timeout={_TIMEOUT}", f"output_dir={folder}"]
    config = _ROOT / "configs" / "tiny" / "decoder.yaml"
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", _MOMENT: str(_moment(folder))}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", *entry, str(config), *small],
        cwd=_ROOT,
        env=os.environ | own | ENGINES[engine],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def _moment(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.moment")


def ended(engine: str, processes: int, folder: Path, steps: int, kill: Kill) -> Ended:
    _, errors = start(engine, processes, folder, steps, kill)
    if not _moment(folder).is_file():
        sys.exit(f"the {engine} run ended before the kill in {kill.point}:\n{errors}")
    seconds = time.time() - _moment(folder).stat().st_mtime
    _moment(folder).unlink()
    told = [line for line in errors.splitlines() if "duet: error:" in line]
    return Ended(kill, seconds, complete_checkpoints(folder)[-1].name, told)


def reference(engine: str, processes: int, folder: Path, steps: int) -> Path:
    """The run that nothing ends."""
    shutil.rmtree(folder, ignore_errors=True)
    status, errors = start(engine, processes, folder, steps)
    if status:
        sys.exit(f"the {engine} run fails without a kill:\n{errors}")
    return folder


def rows(engine: str, processes: int, folder: Path, ends: list[Kill]) -> Iterator[tuple[str, bool]]:
    """A row a kill, and whether it is as it should be."""
    steps = 2 * len(ends) + 1  # a signal's own step may be finished
    if ends[0].end in (*_FATAL, "ENOSPC"):
        steps = len(ends) + 1
    whole, killed = reference(engine, processes, folder / "whole", steps), folder / "killed"
    shutil.rmtree(killed, ignore_errors=True)
    before = None
    for kill in [*ends, None]:
        if kill is None:
            status, errors = start(engine, processes, killed, steps)
            done = [s["step"] for s in read_metrics(killed)] == list(range(1, steps + 1))
            now, held = (
                None,
                status == 0
                and done
                and same(whole / f"checkpoint-{steps}", killed / f"checkpoint-{steps}"),
            )
        else:
            now = ended(engine, processes, killed, steps, kill)
            held = same(whole / now.left, killed / now.left)
            held = held and (before is None or before.left != now.left)
        if before is not None:
            fatal = before.kill.end in _FATAL
            lines = len(before.told) == processes - fatal
            told = before.told[0].partition("error: ")[2] if before.told else "NOTHING"
            told = told.replace(str(killed), "RUN")
            yield (
                (
                    f"| {engine} | {before.kill.end} | {before.kill.point} | {before.kill.rank} | "
                    f"{before.seconds:.1f} | {before.left} | {'yes' if held else 'NO'} | {told} |"
                ),
                held and lines and before.seconds <= ALLOWED_SECONDS,
            )
        before = now


def end_itself(point: str, rank: str, end: str, run: list[str]) -> None:
    """`duet train`, one process of which comes to an end."""

    def act() -> None:
        Path(os.environ[_MOMENT]).touch()
        if end == "ENOSPC":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.Signals[end])

    if os.environ["RANK"] == rank:
        before_call(*(POINTS | _WRITES)[point], act)
    command.main(run)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2"], choices=ENGINES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--signal", default="SIGKILL", choices=_ENDS)
    parser.add_argument("--kills", type=int, default=10, help="an engine")
    parser.add_argument("--folder", type=Path, default=Path("runs/process_kills"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options, run = parser.parse_known_args(arguments)
    if options.child:
        return end_itself(*options.child, run)
    print(HEAD, flush=True)
    sound: list[bool] = []
    for engine in options.engines:
        folder = options.folder.resolve() / engine
        folder.mkdir(parents=True, exist_ok=True)
        ends = list(islice(cycle(kills(options.signal, options.processes)), options.kills))
        for row, good in rows(engine, options.processes, folder, ends):
            print(row, flush=True)
            sound.append(good)
    print(f"{sum(sound)} of {len(sound)} as they should be")
    sys.exit(not all(sound))


if __name__ == "__main__":
    from duet.configs.errors import exit_on_user_error

    exit_on_user_error(main)
