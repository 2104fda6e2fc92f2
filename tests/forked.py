"""Commands in processes of their own that begin with the libraries loaded, which costs seconds:
each is a fork of a server that loads them once for all tests of a worker.

That a command starts from nothing, and under torchrun, a few tests show beside these.
"""

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[1]
_processes = multiprocessing.get_context("forkserver")
# what commands import; none of their own modules, which run anew
_processes.set_forkserver_preload(
    ["duet.train.loop", "duet.train.evaluation", "duet.train.report", "duet.train.tiny.gaps"]
)


@dataclass(frozen=True)
class Ended:
    """What processes of one command left, in the order of their ranks."""

    statuses: tuple[int, ...]  # below 0: killed by that signal
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        return next((status for status in self.statuses if status), 0)


def run(
    module: str,
    *arguments: str,
    processes: int = 1,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    seconds: float = 600,
) -> Ended:
    """`python -m MODULE ARGUMENTS` in the folder, several as torchrun's own, over gloo. None ends
    another: where one fails, the others must end by themselves within the seconds.
    """
    variables = os.environ | (environment or {})
    with tempfile.TemporaryDirectory() as written:
        if processes > 1:
            # the agent's, at a port that is free
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            variables |= _group(processes, store.port)
        command = module, arguments, variables, folder, Path(written)
        asked = [(*command, rank) for rank in range(processes)]
        started = [_processes.Process(target=_begin, args=one) for one in asked]
        for process in started:
            process.start()
        until = time.monotonic() + seconds
        for process in started:
            process.join(max(0, until - time.monotonic()))
        late = [process for process in started if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        texts = [
            "".join((Path(written) / f"{name}-{rank}").read_text() for rank in range(processes))
            for name in ("stdout", "stderr")
        ]
    assert not late, f"{len(late)} of {processes} did not end: {texts[1]}"
    return Ended(tuple(process.exitcode for process in started), *texts)


def _group(processes: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes."""
    told = {
        "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0, "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True, "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    return {name: str(value) for name, value in told.items()}


def _begin(
    module: str,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    folder: Path,
    written: Path,
    rank: int,
) -> None:
    """The fork's own."""
    gc.freeze()  # no collection walks what the server has loaded, nor copies its pages
    os.environ.clear()
    os.environ.update(variables)
    if "WORLD_SIZE" in variables:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(written / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
