"""Held-out prompts, fixed seeds: every model's pictures and every reward's scores of them."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from duet.configs.errors import UserError
from duet.configs.outputs import make_folder, require_free, staged, write_new
from duet.configs.pictures import read_picture
from duet.configs.row import Row
from duet.configs.rows import rows_of
from duet.configs.schema import RunConfig
from duet.configs.turns import trained_rewards, turns
from duet.inference.adapter_set import joined_adapters
from duet.inference.engine import Engine
from duet.inference.layout import Size
from duet.inference.model import load_pipeline
from duet.inference.outline import read_outline
from duet.inference.pictures import to_png
from duet.inference.prompt_check import check_prompts
from duet.inference.provenance import Provenance
from duet.inference.request import Request
from duet.inference.rollout import Rollout
from duet.inference.trained import load_trained
from duet.rewards.answers import Answer
from duet.rewards.base import Reward, RewardInput, score
from duet.rewards.registry import load_rewards
from duet.rewards.resting import Resting
from duet.train.labels import labels
from duet.train.lock import locked
from duet.train.prompts import derive_seed
from duet.train.results import (
    BASE,
    PAGE,
    RESULTS,
    SOURCES,
    STRIP,
    ModelResult,
    Results,
    write_results,
)
from duet.train.statistics import summarise

_SEED = 2**31  # far from any training seed; the same for every model
_SHOWN = 512, 512  # pixels at most, of a source in the report


@dataclass(frozen=True)
class Judges:
    """What pictures are measured by."""

    rewards: Mapping[str, Reward]
    resting: Resting


def evaluate(
    config: RunConfig, models: Sequence[tuple[str, ...]], output: Path, average: bool = False
) -> Results:
    """Evaluate the base and then each model (a tuple of checkpoints to load together), or with
    `average` the averages of its weights.

    Pictures are written as they are made, and scored with them: memory holds those of one
    batch. With all done, `output` has a folder of them a model, and the results. Every model
    gets the same prompts and seeds, so differences to the base are paired. A policy is run in
    the arithmetic of the config, and so in that which training sampled with.
    Raises UserError, before weights are read, for rows, checkpoints that do not go together,
    and a folder in which something would be overwritten or that another process writes to.
    """
    rows = rows_of(config, "eval")
    names = [BASE, *labels(models)]
    adapters = [(), *(tuple(_check_checkpoints(config, model, average)) for model in models)]
    check_prompts(read_outline(config.model.path), rows, _size(config))
    edits = any(row.sources for row in rows)
    entries = [*names, *([SOURCES] if edits else []), RESULTS]
    require_free("--output", output, [*entries, PAGE, STRIP])
    with locked("--output", output):
        rewards = load_rewards((*trained_rewards(config), *config.eval.rewards))
        judges = Judges(rewards, Resting(rewards.items(), config.model.offload))
        judges.resting.rest()
        with staged("--output", output, entries) as folder:
            for name in names:
                make_folder("--output", folder / name)
            named = dict(zip(names, adapters, strict=True))
            found = _evaluate_models(config, rows, judges, named, folder)
            prompts = [row.prompt for row in rows]
            sources = _write_sources(rows, folder) if edits else []
            stage = "+".join(turns(config))
            results = Results(stage, config.eval.confidence, prompts, found, sources)
            write_results(results, folder)
    return results


def _check_checkpoints(
    config: RunConfig, checkpoints: Sequence[str], average: bool
) -> dict[str, Provenance]:
    """Their adapters or weights, by folder."""
    infos = joined_adapters("--checkpoint", checkpoints, config.model.path, average)
    for checkpoint, info in infos.items():
        if info.arithmetic != config.arithmetic:
            trained, asked = info.arithmetic, config.arithmetic
            raise UserError(
                f"model.dtype = {asked.dtype!r} and train.mixed_precision = "
                f"{asked.mixed_precision!r}, but {checkpoint!r} was trained with "
                f"{trained.dtype!r} and {trained.mixed_precision!r}: give those, or another "
                "policy than the trained one is measured"
            )
    return infos


def _evaluate_models(
    config: RunConfig,
    rows: Sequence[Row],
    judges: Judges,
    models: Mapping[str, tuple[str, ...]],  # a name's adapters
    folder: Path,
) -> list[ModelResult]:
    results: list[ModelResult] = []
    for name, checkpoints in models.items():
        engine = _engine(config, checkpoints)
        made = _evaluate_model(engine, config, rows, judges, folder / name)
        del engine
        gc.collect()  # the next model must fit in its place
        base = results[0].scores if results else None
        metrics = {k: summarise(v, base and base[k], config.eval) for k, v in made.scores.items()}
        images = [f"{name}/{file}" for files in made.files for file in files]
        results.append(ModelResult(name, list(checkpoints), images, made.scores, metrics))
    return results


def _size(config: RunConfig) -> Size:
    return Size.of(config.sampling)


def _engine(config: RunConfig, checkpoints: Sequence[str]) -> Engine:
    model = config.model
    pipeline = load_pipeline(model.path, model.dtype, model.device, model.offload)
    for checkpoint in checkpoints:
        load_trained(pipeline, checkpoint)
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
    judges: Judges,
    folder: Path,
) -> _Made:
    size, count = _size(config), config.eval.images_per_prompt
    requests = [
        Request(
            row.prompt, tuple(derive_seed(_SEED, i, n) for n in range(count)), size, row.sources
        )
        for i, row in enumerate(rows)
    ]
    made = _Made([[]] * len(rows), {name: [[]] * len(rows) for name in judges.rewards})
    for part in engine.in_parts(requests):
        for place, rollout in part:
            made.files[place] = list(_write_pictures(rollout, folder, place))
        with judges.resting.awake():
            scores = _score(judges.rewards, [(rows[place], rollout) for place, rollout in part])
        for name, answers in scores.items():
            for (place, _), own in zip(part, answers, strict=True):
                made.scores[name][place] = own
    return made


def _write_pictures(rollout: Rollout, folder: Path, place: int) -> Iterator[str]:
    for n, image in enumerate(rollout.images):
        write_new(folder / f"{place:03d}-{n}.png", to_png(image))
        yield f"{place:03d}-{n}.png"


def _write_sources(rows: Sequence[Row], folder: Path) -> list[list[str]]:
    """Of each row, as large as a page shows them; paths below the folder."""
    make_folder("--output", folder / SOURCES)
    paths = []
    for place, row in enumerate(rows):
        paths.append([f"{SOURCES}/{place:03d}-{n}.png" for n in range(len(row.sources))])
        for path, stored in zip(paths[-1], row.sources, strict=True):
            picture = read_picture(stored)
            picture.thumbnail(_SHOWN)
            write_new(folder / path, to_png(picture))
    return paths


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
