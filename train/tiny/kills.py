"""Kill small runs, go on, and compare with the run that nothing ended: bit for bit?

    python -m duet.train.tiny.kills [--stage ar] [--random 20] [--aimed 10] [--folder runs/kills]

Random kills: SIGKILL at moments drawn from the time between the first step's begin and the run's
end. Aimed ones: SIGTERM, SIGINT and SIGKILL in a rollout, in scoring, in an update and while a
checkpoint is written. Each run is a process of its own. Prints a line a kill; status 1 when one
run ends in other weights or moments of the optimizer.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from safetensors.torch import load_file

from duet.inference.engine import Engine
from duet.inference.parts import PARTS
from duet.train import __main__ as command
from duet.train.checkpoint import complete_checkpoints
from duet.train.journal import LOG_FILE
from duet.train.metrics import read_metrics
from duet.train.policy import Policy
from duet.train.scoring import Scorer

_ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
SMALL = (
    f"train.max_steps={STEPS}",
    "train.save_steps=3",
    "train.trackers=[tensorboard]",
    "rollout.prompts_per_step=2",
    "rollout.num_generations=4",
    "rollout.batch_size=4",  # two batches: one is scored while the other is sampled
    "optim.per_device_train_batch_size=4",
    "grpo.num_iterations=2",
    "sampling.num_inference_steps=6",
    "rewards=[{name: duet.train.tiny.hackable.Sharpness}]",
)
# the method that is called in each phase, and its call in the second step, or the first checkpoint
PHASES = {
    "rollout": (Engine, "decode", 4),  # the gate has one
    "scoring": (Scorer, "__call__", 3),
    "update": (Policy, "step", 6),
    "saving": (Policy, "save", 1),
}
_SIGNALS = ("SIGTERM", "SIGINT", "SIGKILL")


@dataclass(frozen=True)
class Kill:
    told: str
    end: Callable[[subprocess.Popen], None]  # waits for the moment
    child: tuple[str, ...] = ()  # arguments that make the run signal itself


def before_call(owner: type, name: str, call: int, act: Callable[[], None]) -> None:
    """`act` runs before the method's call of that number, from 1."""
    true, count = getattr(owner, name), iter(range(1, sys.maxsize))

    def watched(self, *given, **named):
        if next(count) == call:
            act()
        return true(self, *given, **named)

    setattr(owner, name, watched)


def start(stage: str, folder: Path, child: tuple[str, ...], *overrides: str) -> subprocess.Popen:
    config = _ROOT / "configs" / "tiny" / f"{stage}.yaml"
    entry = ["-m", "duet.train.tiny.kills", *child] if child else ["-m", "duet.train"]
    arguments = [str(config), *SMALL, f"output_dir={folder}", *overrides]
    return subprocess.Popen(
        [sys.executable, *entry, *arguments],
        cwd=_ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def random_kills(count: int, first: float, last: float) -> Iterator[Kill]:
    """Seconds from a run's start."""
    draw = random.Random(0)
    for _ in range(count):
        moment = draw.uniform(first, last)

        def end(process: subprocess.Popen, moment: float = moment) -> None:
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()

        yield Kill(f"SIGKILL after {moment:.2f} s", end)


def aimed_kills(count: int) -> Iterator[Kill]:
    for phase, name in islice(zip(cycle(PHASES), cycle(_SIGNALS)), count):
        child = ("--child", phase, "--signal", name)
        yield Kill(f"{name} in {phase}", lambda process: None, child)


def same(one: Path, other: Path) -> bool:
    """Weights to the bit; the optimizer's and the schedule's files byte for byte."""
    files = [p.relative_to(one) for p in one.rglob("*")]
    weights = [f for f in files if f.suffix == ".safetensors"]
    states = [f for f in files if f.suffix == ".bin"]
    assert weights and states
    return all((one / f).read_bytes() == (other / f).read_bytes() for f in states) and all(
        _equal(load_file(one / f), load_file(other / f))  # the order of their headers is chance
        for f in weights
    )


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def attempt(stage: str, folder: Path, whole: Path, kill: Kill) -> bool:
    """One kill and one resume; prints what came of it."""
    shutil.rmtree(folder, ignore_errors=True)
    process = start(stage, folder, kill.child)
    kill.end(process)
    status = process.wait()
    left = [c.name for c in complete_checkpoints(folder)]
    resumed = start(stage, folder, (), "train.resume=latest").wait()
    held = resumed == 0 and same(whole, folder / whole.name)
    held = held and [s["step"] for s in read_metrics(folder)] == list(range(1, STEPS + 1))
    newest = left[-1] if left else "none"
    print(f"{stage:8} {kill.told:22} status {status:4}, left {newest:13}", end=" ")
    print("the same to the bit" if held else f"NOT THE SAME (resumed: {resumed})", flush=True)
    return held


def reference(stage: str, folder: Path) -> tuple[Path, float, float]:
    """The run that nothing ends; seconds to its first step and to its end."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    process = start(stage, folder, ())
    while not (folder / LOG_FILE).is_file() and process.poll() is None:
        time.sleep(0.02)
    first = time.monotonic() - began
    if process.wait() != 0:
        sys.exit(f"the {stage} run fails without a kill")
    return folder / f"checkpoint-{STEPS}", first, time.monotonic() - began


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", action="append", choices=PARTS, help="both if none is named")
    parser.add_argument("--random", type=int, default=20, help="kills a stage")
    parser.add_argument("--aimed", type=int, default=10, help="signals a stage")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"))
    parser.add_argument("--child", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--signal", choices=_SIGNALS, help=argparse.SUPPRESS)
    options, run = parser.parse_known_args(arguments)
    if options.child:
        number = signal.Signals[options.signal]
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's background jobs ignore it
        before_call(*PHASES[options.child], lambda: os.kill(os.getpid(), number))
        return command.main(run)
    held: list[bool] = []
    for stage in options.stage or PARTS:
        folder = options.folder.resolve() / stage
        whole, first, last = reference(stage, folder / "whole")
        print(f"{stage}: first step after {first:.1f} s, end after {last:.1f} s", flush=True)
        kills = [*random_kills(options.random, first, last), *aimed_kills(options.aimed)]
        held += [attempt(stage, folder / "killed", whole, kill) for kill in kills]
    print(f"{sum(held)} of {len(held)} the same to the bit")
    sys.exit(not all(held))


if __name__ == "__main__":
    from duet.configs.errors import exit_on_user_error

    exit_on_user_error(main)
