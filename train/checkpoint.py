"""Checkpoints: `checkpoint-N/` with adapter, optimizer, scheduler, RNG and position; of a run in
turns, an adapter a part: `ar/adapter`, `decoder/adapter`.

Written under another name, digested, synced to the disk and then renamed: a folder of that name
is whole, and what is damaged later is found out (`sha256sum -c SHA256SUMS` does so too).
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from duet.configs.digests import Damaged, check_digests, refuse_older, write_digests
from duet.configs.errors import UserError
from duet.configs.load import build
from duet.configs.schema import RunConfig
from duet.inference.together import from_main
from duet.train.policy import Policy
from duet.train.state import load_state, save_state

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_POSITION = "trainer_state.json"
_BEGUN = ".begun"  # while a checkpoint is written


@dataclass(frozen=True)
class Inputs:
    """What a run is made from, by its content: paths may change."""

    model: dict[str, str]  # fingerprints of the weights, by component
    data: str  # digest of the training rows
    adapters: dict[str, str] = field(default_factory=dict)  # digests of what parts begin with


@dataclass(frozen=True)
class Position:
    """What a checkpoint tells of itself."""

    step: int  # rollouts that are done
    stage: str  # the part that is trained, or both: ar+decoder
    num_processes: int
    run_id: str  # of the run that wrote it
    inputs: Inputs
    config: dict[str, Any]


def checkpoints(output_dir: Path) -> list[Path]:
    """Everything that bears a checkpoint's name, whole or not, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=_step)


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Those that were written to the end, oldest first; damage since is not looked for."""
    return [p for p in checkpoints(output_dir) if (p / _POSITION).is_file()]


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def checkpoint_at(output_dir: Path, step: int) -> Path:
    """After so many rollouts, whether it is there or not."""
    return output_dir / f"checkpoint-{step}"


def part_folder(checkpoint: Path, part: str, parts: Collection[str]) -> Path:
    """Where a part's weights lie: in the checkpoint itself, where it is the only one."""
    return checkpoint / part if len(parts) > 1 else checkpoint


def save_checkpoint(
    policies: Mapping[str, Policy], config: RunConfig, run_id: str, inputs: Inputs, step: int
) -> Path:
    """Write `checkpoint-{step}` after `step` rollouts, unless this run did so already.

    Every process must call it. Raises UserError where another run's stands.
    """
    final = checkpoint_at(Path(config.output_dir), step)
    accelerator = next(iter(policies.values())).accelerator
    if from_main(accelerator, lambda: _stands(final, run_id)):
        return final
    partial = final.with_name(f".{final.name}.partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _BEGUN).touch()

    def finish() -> None:
        if not (partial / _BEGUN).is_file():  # writers make a folder that is gone anew
            raise FileNotFoundError(f"{str(final.parent)!r} was gone meanwhile")
        (partial / _BEGUN).unlink()
        told = Position(
            step, "+".join(policies), accelerator.num_processes, run_id, inputs, asdict(config)
        )
        (partial / _POSITION).write_text(json.dumps(asdict(told), indent=2))
        write_digests(partial)
        sync_tree(partial)
        partial.rename(final)
        sync(final.parent)

    from_main(accelerator, begin)
    for part, policy in policies.items():
        policy.save(part_folder(partial, part, policies))
    save_state(accelerator, [p.sharding for p in policies.values()], partial)
    from_main(accelerator, finish)
    return final


def load_checkpoint(policies: Mapping[str, Policy], checkpoint: Path) -> None:
    """Weights, optimizers, schedules and random states. Raises UserError for a damaged one."""
    for part, policy in policies.items():
        policy.load(part_folder(checkpoint, part, policies))
    accelerator = next(iter(policies.values())).accelerator
    load_state(accelerator, [p.sharding for p in policies.values()], checkpoint)


def _stands(final: Path, run_id: str) -> bool:
    """This run's checkpoint is there, whole. A damaged one is moved out of the way, and kept."""
    if not os.path.lexists(final):
        return False
    try:
        found = read_position(final)
    except Damaged:
        number = 1
        while os.path.lexists(aside := final.with_name(f"{final.name}.damaged-{number}")):
            number += 1
        final.rename(aside)
        return False
    if found.run_id != run_id:
        raise UserError(f"{str(final)!r} is another run's: give another output_dir")
    return True


def read_position(checkpoint: Path) -> Position:
    """Of a whole checkpoint.

    Raises Damaged, with the file's name, and UserError for one of an older Duet.
    """
    try:
        told = json.loads((checkpoint / _POSITION).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint, f"{_POSITION}: {error}") from error
    lacks = "digests: go on with that version, or begin a new run in another output_dir"
    refuse_older(checkpoint, checkpoint, told, "step", "run_id", lacks)
    try:
        check_digests(checkpoint)
        position = build(Position, told, _POSITION)
    except UserError as error:
        raise _damaged(checkpoint, error) from error
    if checkpoint.resolve().name != f"checkpoint-{position.step}":
        raise _damaged(checkpoint, f"{_POSITION} is at step {position.step}, the folder's name not")
    return position


def _damaged(checkpoint: Path, reason: object) -> Damaged:
    return Damaged(f"checkpoint {str(checkpoint)!r} is damaged ({reason}): resume from another")


def sync_tree(folder: Path) -> None:
    """To the disk: a power cut after this leaves the folder's files as they are."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """One file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
