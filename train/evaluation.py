"""Held-out prompts, fixed seeds: every model's pictures and every reward's scores of them."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from duet.configs.errors import UserError
from duet.configs.outputs import make_folder, require_free, write_new
from duet.configs.row import Row
from duet.configs.rows import rows_of
from duet.configs.schema import RunConfig
from duet.inference.adapter_set import joined_adapters
from duet.inference.adapters import load_adapter
from duet.inference.engine import Engine
from duet.inference.layout import Size
from duet.inference.model import load_pipeline
from duet.inference.pictures import to_png
from duet.inference.prompt_check import check_prompts
from duet.inference.request import Request
from duet.inference.rollout import Rollout
from duet.rewards.answers import Answer
from duet.rewards.base import Reward, RewardInput, score
from duet.rewards.registry import load_rewards
from duet.train.prompts import derive_seed
from duet.train.results import PAGE, RESULTS, STRIP, ModelResult, Results
from duet.train.statistics import summarise

_SEED = 2**31  # far from any training seed; the same for every model
_BASE = "base"


def evaluate(config: RunConfig, models: Sequence[tuple[str, ...]], output: Path) -> Results:
    """Evaluate the base and then each model (a tuple of checkpoints to load together).

    Pictures go to `output/<model>/` as they are made, and are scored with them: memory holds
    those of one batch. Every model gets the same prompts and seeds, so differences to the base
    are paired. A policy is run in the arithmetic of the config, and so in that which training
    sampled with.
    Raises UserError, before weights are read, for rows, checkpoints that do not go together,
    and a folder in which something would be overwritten.
    """
    rows = rows_of(config, "eval")
    names = [_BASE, *labels(models)]
    for checkpoints in models:
        _check_checkpoints(config, checkpoints)
    require_free("--output", output, [*names, RESULTS, PAGE, STRIP])
    make_folder("--output", output)
    rewards = load_rewards((*config.rewards, *config.eval.rewards))
    results: list[ModelResult] = []
    for name, checkpoints in zip(names, [(), *models], strict=True):
        made = _evaluate_model(_engine(config, checkpoints), config, rows, rewards, output / name)
        gc.collect()  # the next model must fit in its place
        base = results[0].scores if results else None
        metrics = {k: summarise(v, base and base[k], config.eval) for k, v in made.scores.items()}
        images = [f"{name}/{file}" for files in made.files for file in files]
        results.append(ModelResult(name, list(checkpoints), images, made.scores, metrics))
    return Results(config.stage, config.eval.confidence, [row.prompt for row in rows], results)


def _check_checkpoints(config: RunConfig, checkpoints: Sequence[str]) -> None:
    infos = joined_adapters("--checkpoint", checkpoints, config.model.path)
    for checkpoint, info in zip(checkpoints, infos, strict=True):
        if info.arithmetic != config.arithmetic:
            trained, asked = info.arithmetic, config.arithmetic
            raise UserError(
                f"model.dtype = {asked.dtype!r} and train.mixed_precision = "
                f"{asked.mixed_precision!r}, but {checkpoint!r} was trained with "
                f"{trained.dtype!r} and {trained.mixed_precision!r}: give those, or another "
                "policy than the trained one is measured"
            )


def labels(models: Sequence[tuple[str, ...]]) -> list[str]:
    """A name a model: its checkpoints' last folders, as many as tell the models apart.

    Raises UserError when a model is given twice.
    """
    paths = [[Path(c).resolve().parts[1:] for c in checkpoints] for checkpoints in models]
    for depth in range(2, 1 + max([2, *(len(p) for model in paths for p in model)])):
        names = ["+".join("-".join(p[-depth:]) for p in model) for model in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError("--checkpoint names one model twice: give every model once")


def _engine(config: RunConfig, checkpoints: Sequence[str]) -> Engine:
    model = config.model
    pipeline = load_pipeline(model.path, model.dtype, model.device, model.offload)
    for checkpoint in checkpoints:
        load_adapter(pipeline, checkpoint)
    return Engine.of(pipeline, config)


@dataclass(frozen=True)
class _Made:
    """Of one model, prompt by prompt."""

    files: list[list[str]]
    scores: dict[str, list[list[Answer]]]


def _evaluate_model(
    engine: Engine,
    config: RunConfig,
    rows: Sequence[Row],
    rewards: Mapping[str, Reward],
    folder: Path,
) -> _Made:
    size = Size(config.sampling.height, config.sampling.width)
    check_prompts(engine.pipeline, rows, size)
    count = config.eval.images_per_prompt
    requests = [
        Request(row.prompt, tuple(derive_seed(_SEED, i, n) for n in range(count)), size)
        for i, row in enumerate(rows)
    ]
    made = _Made([[]] * len(rows), {name: [[]] * len(rows) for name in rewards})
    try:
        folder.mkdir()
    except OSError as error:  # another evaluation began in this folder meanwhile
        raise UserError(f"{str(folder)!r} cannot be made: {error.strerror}") from error
    for part in engine.in_parts(requests):
        for place, rollout in part:
            made.files[place] = list(_write_pictures(rollout, folder, place))
        scores = _score(rewards, [(rows[place], rollout) for place, rollout in part])
        for name, answers in scores.items():
            for (place, _), own in zip(part, answers, strict=True):
                made.scores[name][place] = own
    return made


def _write_pictures(rollout: Rollout, folder: Path, place: int) -> Iterator[str]:
    for n, image in enumerate(rollout.images):
        write_new(folder / f"{place:03d}-{n}.png", to_png(image))
        yield f"{place:03d}-{n}.png"


def _score(
    rewards: Mapping[str, Reward], part: Sequence[tuple[Row, Rollout]]
) -> dict[str, list[list[Answer]]]:
    """Per reward [prompts, images]; NaN where it failed, None where it does not apply."""
    inputs = [
        RewardInput(image, row.prompt, row) for row, rollout in part for image in rollout.images
    ]
    sizes = [len(rollout) for _, rollout in part]
    answers = {name: iter(score(reward, name, inputs, sizes)) for name, reward in rewards.items()}
    return {name: [[next(own) for _ in range(n)] for n in sizes] for name, own in answers.items()}
