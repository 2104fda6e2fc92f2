"""Processes on this machine's CPU, started by torchrun over gloo, under an engine."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# accelerate's environment for each, as launch/accelerate/*.yaml set it
ENGINES = {
    "ddp": {},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}
_ROOT = Path(__file__).resolve().parents[2]


def launched(
    engine: str, processes: int, *module: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` on each, to its end, in the project's folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | ENGINES[engine]
    return subprocess.run(
        [*command, "--nproc_per_node", str(processes), "-m", *module],
        env=os.environ | own | (environment or {}),
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )


def require_success(done: subprocess.CompletedProcess[str]) -> None:
    """Raises CalledProcessError, with what the processes told on stderr above it."""
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
