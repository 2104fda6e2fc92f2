"""End a small run in several processes again and again: does it go on to the bit?

    python -m duet.train.tiny.process_kills [--engines ddp fsdp2] [--stages decoder]
        [--ends SIGKILL] [--kills 10] [--processes 2]

The end comes to one process, in turn to each, in a rollout, in scoring, in an update and while a
checkpoint is written (before the weights, and before the optimizer's state): 10 points with two
processes. The others must end by themselves, with a line. The run goes on from what is left, makes
a step and its checkpoint, which must be that of a run that nothing ended, and is ended in the step
after it. Prints a row a kill, with the seconds from it to the end of all; status 1 where a
checkpoint differs or a process hangs.

The ends: SIGKILL, SIGSTOP (a process that hangs), SIGTERM, SIGUSR1; SERVER, each process has a
reward server of its own, and that of one is killed; ENOSPC and FOLDER, the disk is full, or the
output folder is gone, when the main process writes; TORN, SIGKILL, and half of a file of the newest
checkpoint is gone, so the run goes on from the one before.
"""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

from duet.inference.engine import Engine
from duet.inference.parts import PARTS
from duet.train import __main__ as command
from duet.train import checkpoint, state
from duet.train.checkpoint import complete_checkpoints
from duet.train.metrics import read_metrics
from duet.train.policy import Policy
from duet.train.scoring import Scorer
from duet.train.tiny.kills import SMALL, before_call, same
from duet.train.tiny.launcher import ENGINES, launched
from duet.train.tuning import Lora

_ROOT = Path(__file__).resolve().parents[2]
_MOMENT = "KILLED_AT"  # names the file that is made at the moment of the kill
_SERVERS = "REWARD_SERVERS"  # [address, process id] of each process's
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
_WRITES = {
    "writing weights": (Lora, "write", 2),
    "writing moments": (state, "save", 3),  # of a part its moments and its schedule
}
# in a start's third step, so that a whole checkpoint stands before the torn one: what is torn
_TORN = {"torn weights": "*.safetensors", "torn moments": "optimizer.bin"}
_TEARS = dict.fromkeys(_TORN, (Policy, "step", 6))
_FATAL = ("SIGKILL", "SIGSTOP", "TORN")
_SIGNALS = ("SIGTERM", "SIGUSR1")  # after which the step that is being made may be finished
# an end's own points, and whether it comes to the main process alone
_OWN_POINTS = {
    "ENOSPC": (_WRITES, True),
    "FOLDER": (_WRITES, True),
    "SERVER": (["scoring"], False),
    "TORN": (_TORN, False),
}
_ENDS = (*_FATAL, *_SIGNALS, "ENOSPC", "FOLDER", "SERVER")


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
    status: str  # of the process that ended first
    left: str  # the newest whole checkpoint
    told: list[str]  # by the processes that were left


HEAD = (
    "| engine | stage | end | in | process | seconds to the end | exit status | left | "
    "goes on to the bit | told |\n|---|---|---|---|---|---|---|---|---|---|"
)


def kills(end: str, processes: int) -> Iterator[Kill]:
    """Every point, then again on the other processes; only the main one writes."""
    points, main_alone = _OWN_POINTS.get(end, (POINTS, False))
    for turn in range(1 if main_alone else processes):
        for number, point in enumerate(points):
            yield Kill(point, 0 if main_alone else (turn + number) % processes, end)


@dataclass(frozen=True)
class Case:
    """What is started."""

    engine: str
    stage: str
    processes: int
    steps: int


def start(case: Case, folder: Path, kill: Kill | None = None) -> tuple[int, str]:
    """The run from its newest checkpoint over processes of this machine's CPU, one of which may
    come to an end: the status, and what was told."""
    entry, servers = ["duet.train"], nullcontext([])
    if kill is not None:
        entry = ["duet.train.tiny.process_kills", "--child", kill.point, str(kill.rank), kill.end]
        if kill.end == "SERVER":
            servers = reward_servers(case.processes)
    small = [*SMALL, f"train.max_steps={case.steps}", "train.save_steps=1", "train.resume=latest"]
    small += [f"train.ddp_timeout={_TIMEOUT}", f"output_dir={folder}"]
    config = _ROOT / "configs" / "tiny" / f"{case.stage}.yaml"
    with servers as there:
        own = {_MOMENT: str(_moment(folder)), _SERVERS: json.dumps(there)}
        asked = (*entry, str(config), *small)
        done = launched(case.engine, case.processes, *asked, environment=own)
    return done.returncode, done.stderr


@contextmanager
def reward_servers(count: int) -> Iterator[list[tuple[str, int]]]:
    """The addresses and process ids of so many `duet rewards serve`."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        config = folder / "rewards.yaml"
        config.write_text("rewards: [{name: duet.train.tiny.hackable.Sharpness}]")
        command = [sys.executable, "-m", "duet.launch.cli", "rewards", "serve"]
        command += [str(config), "--port", "0"]
        servers = [
            running.enter_context(
                subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(count)
        ]
        for server in servers:
            running.callback(server.kill)
        told = [server.stdout.readline() for server in servers]
        urls = [re.search(r"http://[^\s/]+", line)[0] for line in told]
        yield [(url, server.pid) for url, server in zip(urls, servers, strict=True)]


def _moment(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.moment")


def ended(case: Case, folder: Path, kill: Kill) -> Ended:
    _, errors = start(case, folder, kill)
    if not _moment(folder).is_file():
        sys.exit(f"the {case.engine} run ended before the end in {kill.point}:\n{errors}")
    seconds = time.time() - _moment(folder).stat().st_mtime
    _moment(folder).unlink()
    if kill.end == "FOLDER":  # it comes back
        _gone(folder).rename(folder)
    told = [line for line in errors.splitlines() if "duet: error:" in line]
    status = re.search(r"Root Cause.*?exitcode\s*:\s*(-?\d+)", errors, re.DOTALL)
    whole = complete_checkpoints(folder)
    if kill.end == "TORN":
        torn = next(whole.pop().rglob(_TORN[kill.point]))
        os.truncate(torn, torn.stat().st_size // 2)
    return Ended(kill, seconds, status[1] if status else "none", whole[-1].name, told)


def _gone(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.gone")


def reference(case: Case, folder: Path) -> Path:
    """The run that nothing ends."""
    shutil.rmtree(folder, ignore_errors=True)
    status, errors = start(case, folder)
    if status:
        sys.exit(f"the {case.engine} run fails without a kill:\n{errors}")
    return folder


def rows(
    engine: str, stage: str, processes: int, folder: Path, ends: list[Kill]
) -> Iterator[tuple[str, bool]]:
    """A row a kill, and whether it is as it should be."""
    steps = 1 + sum(2 if kill.end in (*_SIGNALS, "TORN") else 1 for kill in ends)
    case = Case(engine, stage, processes, steps)
    whole, killed = reference(case, folder / "whole"), folder / "killed"
    for old in (killed, _gone(killed)):
        shutil.rmtree(old, ignore_errors=True)
    before = None
    for kill in ends:
        now = ended(case, killed, kill)
        held = same(whole / now.left, killed / now.left)
        if before is not None:
            yield _row(case, before, held and before.left != now.left, killed)
        before = now
    status, errors = start(case, killed)
    done = [s["step"] for s in read_metrics(killed)] == list(range(1, steps + 1))
    last = f"checkpoint-{steps}"
    held = status == 0 and done and same(whole / last, killed / last)
    yield _row(case, before, held, killed)


def _row(case: Case, end: Ended, held: bool, folder: Path) -> tuple[str, bool]:
    """`held`: whether what came after it is as if nothing had ended."""
    lines = len(end.told) == case.processes - (end.kill.end in _FATAL)
    told = end.told[0].partition("error: ")[2] if end.told else "NOTHING"
    cells = [case.engine, case.stage, end.kill.end, end.kill.point, str(end.kill.rank)]
    cells += [f"{end.seconds:.1f}", end.status, end.left, "yes" if held else "NO"]
    cells += [told.replace(str(folder), "RUN")]
    return f"| {' | '.join(cells)} |", held and lines and end.seconds <= ALLOWED_SECONDS


def end_itself(point: str, rank: str, end: str, run: list[str]) -> None:
    """`duet train`, one process of which comes to an end, or what it needs."""
    own, moment = int(os.environ["RANK"]), Path(os.environ[_MOMENT])
    folder = moment.with_suffix("")
    if end == "SERVER":
        servers = json.loads(os.environ[_SERVERS])
        url, server = servers[own]
        run = [*run, f"rewards=[{{name: remote, args: {{url: '{url}', reward: Sharpness}}}}]"]

    def act() -> None:
        moment.touch()
        match end:
            case "ENOSPC":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "FOLDER":
                folder.rename(_gone(folder))
            case "SERVER":
                os.kill(server, signal.SIGKILL)
            case "TORN":
                os.kill(os.getpid(), signal.SIGKILL)
            case _:
                os.kill(os.getpid(), signal.Signals[end])

    if own == int(rank):
        before_call(*(POINTS | _WRITES | _TEARS)[point], act)
    command.main(run)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2"], choices=ENGINES)
    parser.add_argument("--stages", nargs="+", default=["decoder"], choices=PARTS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ends", nargs="+", default=["SIGKILL"], choices=_ENDS)
    parser.add_argument("--kills", type=int, help="of each end; default: at every point")
    parser.add_argument("--folder", type=Path, default=Path("runs/process_kills"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options, run = parser.parse_known_args(arguments)
    if options.child:
        return end_itself(*options.child, run)
    print(HEAD, flush=True)
    sound: list[bool] = []
    ends = [
        kill
        for end in options.ends
        for kill in islice(kills(end, options.processes), options.kills)
    ]
    for engine, stage in product(options.engines, options.stages):
        folder = options.folder.resolve() / f"{engine}-{stage}"
        folder.mkdir(parents=True, exist_ok=True)
        for row, good in rows(engine, stage, options.processes, folder, ends):
            print(row, flush=True)
            sound.append(good)
    print(f"{sum(sound)} of {len(sound)} as they should be")
    sys.exit(not all(sound))


if __name__ == "__main__":
    from duet.configs.errors import exit_on_user_error

    exit_on_user_error(main)
