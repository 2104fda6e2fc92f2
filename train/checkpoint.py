"""Checkpoints: `checkpoint-N/` with adapter, optimizer, scheduler, RNG and position.

Written under another name and renamed when complete, so a folder of that name is
always whole.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duet.configs.errors import UserError, require_folder
from duet.configs.schema import RunConfig
from duet.train.metrics import read_metrics
from duet.train.policy import Policy

_NAME = re.compile(r"checkpoint-(\d+)")
_POSITION = "trainer_state.json"


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    return sorted((p for p in found if (p / _POSITION).is_file()), key=_step)


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None = None  # None: with fresh weights
    step: int = 0  # rollouts that are done


def find_start(config: RunConfig, processes: int) -> Start:
    """The checkpoint to go on from, or a fresh start.

    Raises UserError when the run would mix with an older one's checkpoints, and when
    the named checkpoint is none.
    """
    output_dir = Path(config.output_dir)
    require_folder("output_dir", output_dir)
    done = complete_checkpoints(output_dir)
    if config.train.resume is None:
        if done:
            raise UserError(
                f"output_dir = {config.output_dir!r} holds {done[-1].name} already: "
                "set train.resume=latest to go on, or another output_dir"
            )
        if read_metrics(output_dir):
            raise UserError(
                f"output_dir = {config.output_dir!r} holds the metrics of a run without a "
                "checkpoint: set train.resume=latest to begin it again, or another output_dir"
            )
        return Start()
    if config.train.resume == "latest":
        return Start(done[-1], _position(done[-1], config, processes)) if done else Start()
    path = Path(config.train.resume)
    if not (path / _POSITION).is_file():
        raise UserError(
            f"train.resume = {config.train.resume!r} is no complete checkpoint: "
            "give 'latest' or a checkpoint-N folder"
        )
    step = _position(path, config, processes)
    if done and done[-1].resolve() != path.resolve():
        raise UserError(
            f"train.resume = {config.train.resume!r} is at step {step}, but output_dir = "
            f"{config.output_dir!r} holds {done[-1].name} besides: give another output_dir"
        )
    return Start(path, step)


def save_checkpoint(policy: Policy, config: RunConfig, step: int) -> Path:
    """Write `checkpoint-{step}` after `step` rollouts, unless it is there whole already.

    Every process must call it.
    """
    final = Path(config.output_dir) / f"checkpoint-{step}"
    if (final / _POSITION).is_file():
        return final
    accelerator = policy.accelerator
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    policy.save(partial)
    if accelerator.is_main_process:
        position = {
            "step": step,
            "stage": config.stage,
            "num_processes": accelerator.num_processes,
            "config": asdict(config),
        }
        (partial / _POSITION).write_text(json.dumps(position, indent=2))
        partial.rename(final)
    accelerator.wait_for_everyone()
    return final


# what the optimizer, the schedule and the order of the prompts were made for
_KEPT = (
    "seed",
    "lora",
    "optim",
    "rollout.prompts_per_step",
    "rollout.num_generations",
    "grpo.num_iterations",
    "model.dtype",
    "train.mixed_precision",
)


def _position(checkpoint: Path, config: RunConfig, processes: int) -> int:
    """The number of rollouts done. Raises UserError for a damaged or foreign checkpoint."""
    try:
        position = json.loads((checkpoint / _POSITION).read_text())
        step, stage = int(position["step"]), position["stage"]
        trained, saved = position["num_processes"], _flat(position["config"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"checkpoint {str(checkpoint)!r} is damaged: {error!r}") from error
    if stage != config.stage:
        raise UserError(
            f"checkpoint {str(checkpoint)!r} is of stage {stage!r}, the config of {config.stage!r}"
        )
    if trained != processes:  # the schedule counts updates, and each process has its RNG
        raise UserError(
            f"{processes} processes, but checkpoint {str(checkpoint)!r} was trained with "
            f"{trained}: launch that many"
        )
    for name, value in _flat(json.loads(json.dumps(asdict(config)))).items():
        kept = any(name == k or name.startswith(f"{k}.") for k in _KEPT)
        if kept and saved.get(name, value) != value:
            raise UserError(
                f"{name} = {value!r}, but checkpoint {str(checkpoint)!r} was trained with "
                f"{saved[name]!r}: give that to go on, or begin a new run in another output_dir"
            )
    return step


def _flat(tree: dict) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, one level deep."""
    sections = {k: v if isinstance(v, dict) else {"": v} for k, v in tree.items()}
    return {f"{k}.{n}".rstrip("."): v for k, part in sections.items() for n, v in part.items()}
