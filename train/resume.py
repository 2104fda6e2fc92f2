"""Where a run begins, and what it must agree in with the checkpoint that it goes on from."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from duet.configs.digests import Damaged
from duet.configs.errors import UserError, require_folder, tell
from duet.configs.row import PICTURES, SOURCES, Row
from duet.configs.schema import RunConfig
from duet.configs.turns import turns
from duet.inference.adapter_files import AdapterInfo
from duet.inference.fingerprint import fingerprint
from duet.inference.model import COMPONENTS, model_folder
from duet.inference.provenance import Provenance
from duet.inference.trained import averaged, check_trained
from duet.train.checkpoint import Inputs, Position, checkpoints, part_folder, read_position
from duet.train.metrics import read_metrics

# what the optimizer, the schedule, the order of the prompts and the actions were made for
_KEPT = (
    "part",
    "steps",
    "seed",
    "sampling",
    "sde",
    "tuning",
    "lora",
    "average",
    "optim",
    "rollout.prompts_per_step",
    "rollout.num_generations",
    "rollout.priors",
    "grpo.num_iterations",
    "model.dtype",
    "train.mixed_precision",
)
# of these what changes memory alone
_FREE = ("optim.gradient_checkpointing", "optim.steps_per_backward")
# what may be changed on purpose, and is told
_TOLD = (
    "rewards",
    "grpo",
    "train.max_steps",
    "rollout.prior_cache",
    "rollout.priors_per_prompt",
)


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    run_id: str
    inputs: Inputs
    checkpoint: Path | None = None  # None: with fresh weights
    step: int = 0  # rollouts that are done


def read_inputs(config: RunConfig, rows: Sequence[Row]) -> Inputs:
    """Raises UserError for a model that is not there."""
    folder = model_folder(config.model.path)
    model = {name: fingerprint(folder / name) for name in COMPONENTS}
    digest = hashlib.sha256()
    for row in rows:  # a picture by its name: a data set may be moved
        named = {k: _name(v) if k in PICTURES else v for k, v in row.items()}
        if SOURCES in row:
            named[SOURCES] = list(map(_name, row[SOURCES]))
        digest.update(json.dumps(named, sort_keys=True, default=repr).encode() + b"\n")
    return Inputs(model, digest.hexdigest())


def _name(picture: Any) -> str:
    return Path(picture).name if isinstance(picture, str) else "the dataset's own"


def find_start(config: RunConfig, processes: int, inputs: Inputs) -> Start:
    """The checkpoint to go on from, or a fresh start.

    Raises UserError when the run would mix with an older one's checkpoints, when there is no
    whole checkpoint to go on from, and when the run does not agree with it.
    """
    output_dir = Path(config.output_dir)
    require_folder("output_dir", output_dir)
    held = checkpoints(output_dir)
    if config.train.resume is None:
        _require_empty(output_dir, held)
        return Start(uuid4().hex, inputs)
    if config.train.resume == "latest":
        if not held:
            if read_metrics(output_dir):
                tell(f"{str(output_dir)!r} holds no checkpoint: the run begins at step 0 again")
            return Start(uuid4().hex, inputs)
        path, position = _newest(held)
    else:
        path = Path(config.train.resume)
        position = read_position(path)
        if held and held[-1].resolve() != path.resolve():
            raise UserError(
                f"train.resume = {config.train.resume!r} is at step {position.step}, but "
                f"output_dir = {config.output_dir!r} holds {held[-1].name} besides: "
                "give another output_dir"
            )
    _require_agreement(path, position, config, processes, inputs)
    changes = list(_changes(position, config, _TOLD))
    if changes:
        told = ", ".join(f"{name} {was!r} -> {now!r}" for name, was, now in changes)
        tell(f"changed since {path.name}: {told}")
    same_run = path.resolve().parent == output_dir.resolve()
    return Start(position.run_id if same_run else uuid4().hex, inputs, path, position.step)


def _require_empty(output_dir: Path, held: Sequence[Path]) -> None:
    if held:
        raise UserError(
            f"output_dir = {str(output_dir)!r} holds {held[-1].name} already: "
            "set train.resume=latest to go on, or another output_dir"
        )
    if read_metrics(output_dir):
        raise UserError(
            f"output_dir = {str(output_dir)!r} holds the metrics of a run without a "
            "checkpoint: set train.resume=latest to begin it again, or another output_dir"
        )


def _newest(held: Sequence[Path]) -> tuple[Path, Position]:
    """The newest whole one; what is passed over is told."""
    reasons = []
    for path in reversed(held):
        try:
            position = read_position(path)
        except Damaged as error:
            reasons.append(str(error))
            continue
        if reasons:
            tell(f"{'; '.join(reasons)}; goes on from {path.name}, the newest whole one")
        return path, position
    raise UserError(f"train.resume = 'latest', but no checkpoint is whole: {reasons[0]}")


def _require_agreement(
    path: Path, position: Position, config: RunConfig, processes: int, inputs: Inputs
) -> None:
    checkpoint, parts = f"checkpoint {str(path)!r}", turns(config)
    if position.stage != "+".join(parts):
        raise UserError(
            f"{checkpoint} is of stage {position.stage!r}, the config of {'+'.join(parts)!r}"
        )
    if position.num_processes != processes:  # the schedule counts updates, each has its RNG
        raise UserError(
            f"{processes} processes, but {checkpoint} was trained with "
            f"{position.num_processes}: launch that many"
        )
    for name, was, now in _changes(position, config, _KEPT):
        raise UserError(
            f"{name} = {now!r}, but {checkpoint} was trained with {was!r}: "
            "give that to go on, or begin a new run in another output_dir"
        )
    for part, weights in inputs.model.items():
        if position.inputs.model.get(part) != weights:
            raise UserError(
                f"model.path = {config.model.path!r} has another {part} than {checkpoint} was "
                "trained with: give that model to go on"
            )
    if position.inputs.data != inputs.data:
        raise UserError(
            f"data.train = {config.data.train!r} has other rows than {checkpoint} was trained "
            "with: give those to go on, or begin a new run in another output_dir"
        )
    for part, own in parts.items():
        folder = part_folder(path, part, parts)
        for each in [folder, averaged(folder)] if own.average else [folder]:
            _require_shape(check_trained(each, config.model.path), each, own)


def _require_shape(found: Provenance, folder: str | Path, config: RunConfig) -> None:
    """What is to be read back is what the config trains."""
    held, asked = [found.stage, "full"], [config.stage, config.tuning]
    if isinstance(found, AdapterInfo):
        held[1:] = ["lora", found.lora.rank, found.lora.alpha]
    if config.tuning == "lora":
        asked += [config.lora.rank, config.lora.alpha]
    if held != asked:
        told, wanted = (", ".join(map(str, each)) for each in (held, asked))
        raise UserError(f"checkpoint {str(folder)!r} holds {told}, and its config trains {wanted}")


def _changes(
    position: Position, config: RunConfig, names: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """(setting, then, now) of those below `names` that differ; of each turn too."""
    for name, was, now in _differences(position.config, _used(config)):
        plain = _TURN.sub("", name)
        meant = any(plain == n or plain.startswith(f"{n}.") for n in names)
        if meant and plain not in _FREE:
            yield name, was, now


_TURN = re.compile(r"stages\[\d+\]\.")


def _used(config: RunConfig) -> dict[str, Any]:
    """As JSON holds it, without the adapter's settings where none is trained."""
    told = json.loads(json.dumps(asdict(config)))
    for each in (told, *told["stages"]):
        if each["tuning"] == "full":
            del each["lora"]
    return told


def _differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, then, now); of mappings what both sides know, of lists the turns alone."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in (key for key in now if key in was):
            yield from _differences(was[key], now[key], f"{name}.{key}".lstrip("."))
    elif name == "stages" and len(was) == len(now):
        for i, pair in enumerate(zip(was, now, strict=True)):
            yield from _differences(*pair, f"stages[{i}]")
    elif was != now:
        yield name, was, now
