"""Held-out prompts, fixed seeds: every reward's mean with its bootstrap interval."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from duet.configs.errors import UserError
from duet.configs.row import Row
from duet.configs.rows import rows_of
from duet.configs.schema import EvalConfig, RunConfig
from duet.inference.adapter_files import check_adapter
from duet.inference.adapters import load_adapter
from duet.inference.engine import Engine
from duet.inference.layout import Size
from duet.inference.model import load_pipeline
from duet.inference.prompt_check import check_prompts
from duet.inference.request import Request
from duet.rewards.base import Reward, RewardInput, score
from duet.rewards.registry import load_rewards
from duet.rewards.resting import Resting
from duet.train.prompts import derive_seed

_SEED = 2**31  # far from any training seed; the same for every model


@dataclass(frozen=True)
class Summary:
    """One reward of one model; intervals are bootstrapped over prompts."""

    mean: float
    interval: tuple[float, float]
    perfect: float  # the share of the scored pictures that score exactly 1
    change: float | None = None  # to the base, paired by prompt; None: this is the base
    change_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class ModelResult:
    model: str  # its name in tables and folders
    checkpoints: list[str]
    images: list[str]  # paths below the report's folder, prompt by prompt
    # a reward: [prompts, images]; NaN where not scored, None where it does not apply
    scores: dict[str, list[list[float | None]]]
    metrics: dict[str, Summary]


@dataclass(frozen=True)
class Results:
    stage: str
    confidence: float
    prompts: list[str]
    rows: list[ModelResult]  # the base first


def evaluate(config: RunConfig, models: Sequence[tuple[str, ...]], output: Path) -> Results:
    """Evaluate the base and then each model (a tuple of checkpoints to load together).

    Pictures go to `output/<model>/`. Every model gets the same prompts and seeds, so
    differences to the base are paired. A policy is run in the arithmetic of the config, and
    so in that which training sampled with.
    Raises UserError for checkpoints that do not go together.
    """
    rows = rows_of(config, "eval")
    model_names = labels(models)
    for checkpoints in models:  # what is wrong is told before hours of sampling
        _check_checkpoints(config, checkpoints)
    rewards = load_rewards((*config.rewards, *config.eval.rewards))
    resting = Resting(rewards.items(), config.model.offload)
    resting.rest()
    results: list[ModelResult] = []
    for name, checkpoints in zip(["base", *model_names], [(), *models], strict=True):
        images = _generate(config, checkpoints, rows)
        with resting.awake():
            scores = _score(rewards, rows, images)
        base = results[0].scores if results else None
        metrics = {k: summarise(v, base and base[k], config.eval) for k, v in scores.items()}
        paths = _write_pictures(images, output, name)
        results.append(ModelResult(name, list(checkpoints), paths, scores, metrics))
    return Results(config.stage, config.eval.confidence, [r.prompt for r in rows], results)


def _check_checkpoints(config: RunConfig, checkpoints: Sequence[str]) -> None:
    infos = [check_adapter(c, config.model.path) for c in checkpoints]
    stages = [info.stage for info in infos]
    if len(set(stages)) < len(stages):
        raise UserError(
            f"--checkpoint {','.join(checkpoints)} joins adapters of {' and '.join(stages)}: "
            "give one of each stage"
        )
    for checkpoint, info in zip(checkpoints, infos, strict=True):
        if info.arithmetic != config.arithmetic:
            trained, asked = info.arithmetic, config.arithmetic
            raise UserError(
                f"model.dtype = {asked.dtype!r} and train.mixed_precision = "
                f"{asked.mixed_precision!r}, but {checkpoint!r} was trained with "
                f"{trained.dtype!r} and {trained.mixed_precision!r}: give those, or another "
                "policy than the trained one is measured"
            )


def _write_pictures(images: Sequence[Sequence[Image.Image]], output: Path, name: str) -> list[str]:
    """Paths relative to `output`, prompt by prompt."""
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, prompt_images in enumerate(images):
        for n, image in enumerate(prompt_images):
            path = folder / f"{i:03d}-{n}.png"
            image.save(path)
            paths.append(str(path.relative_to(output)))
    return paths


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


def _generate(
    config: RunConfig, checkpoints: Sequence[str], rows: Sequence[Row]
) -> list[list[Image.Image]]:
    model = config.model
    pipeline = load_pipeline(model.path, model.dtype, model.device, model.offload)
    for checkpoint in checkpoints:
        load_adapter(pipeline, checkpoint)
    engine = Engine.of(pipeline, config)
    size = Size(config.sampling.height, config.sampling.width)
    check_prompts(pipeline, rows, size)
    count = config.eval.images_per_prompt
    requests = [
        Request(row.prompt, tuple(derive_seed(_SEED, i, n) for n in range(count)), size)
        for i, row in enumerate(rows)
    ]
    images = [rollout.images for rollout in engine.rollout(requests)]
    del pipeline, engine
    gc.collect()  # the next model must fit in its place
    return images


def _score(
    rewards: Mapping[str, Reward], rows: Sequence[Row], images: Sequence[list[Image.Image]]
) -> dict[str, list[list[float | None]]]:
    """Per reward [prompts, images]; NaN where it failed, None where it does not apply."""
    inputs = [
        RewardInput(image, row.prompt, row)
        for row, prompt_images in zip(rows, images, strict=True)
        for image in prompt_images
    ]
    sizes = [len(prompt_images) for prompt_images in images]
    return {
        name: np.reshape(score(reward, name, inputs, sizes), (len(rows), -1)).tolist()
        for name, reward in tqdm(rewards.items(), desc="scoring", leave=False, disable=None)
    }


def summarise(scores: list, base: list | None, config: EvalConfig) -> Summary:
    """Means over prompts of [prompts, images] scores; `base`: those to compare with."""
    values, single = _prompt_means(scores), np.array(scores, dtype=float)
    change = None if base is None else values - _prompt_means(base)
    return Summary(
        mean=_mean(values),
        interval=bootstrap_interval(values, config),
        perfect=float((single == 1).sum() / max(1, (~np.isnan(single)).sum())),
        change=None if change is None else _mean(change),
        change_interval=None if change is None else bootstrap_interval(change, config),
    )


def _mean(values: np.ndarray) -> float:
    """Of what is known; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _prompt_means(scores: list) -> np.ndarray:
    """[prompts, images] -> [prompts], over the pictures that could be scored."""
    table = np.array(scores, dtype=float)
    known = ~np.isnan(table)
    total = np.where(known, table, 0.0).sum(-1)
    return np.where(known.any(-1), total / np.maximum(known.sum(-1), 1), np.nan)


def bootstrap_interval(values: Sequence[float], config: EvalConfig) -> tuple[float, float]:
    """Percentile bootstrap of the mean over prompts (Efron), NaN left out."""
    known = np.array([v for v in values if not np.isnan(v)])
    if not len(known):
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    picks = rng.integers(len(known), size=(config.bootstrap_samples, len(known)))
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(known[picks].mean(-1), [tail, 1 - tail])
    return float(low), float(high)


def text_table(results: Results) -> str:
    """Models by rewards; below the base, the paired change and its interval."""
    names = list(results.rows[0].metrics)
    width = max(len(row.model) for row in results.rows)
    lines = [" | ".join([" " * width, *(f"{n:>30}" for n in names)])]
    for row in results.rows:
        cells = [f"{_cell(row.metrics[n]):>30}" for n in names]
        lines.append(" | ".join([row.model.ljust(width), *cells]))
    return "\n".join(lines)


def _cell(summary: Summary) -> str:
    if summary.change_interval is None:
        low, high = summary.interval
        return f"{summary.mean:.3f} [{low:.3f}, {high:.3f}]"
    low, high = summary.change_interval
    return f"{summary.mean:.3f} {summary.change:+.3f} [{low:+.3f}, {high:+.3f}]"
