"""Held-out prompts, fixed seeds: every reward's mean with its bootstrap interval."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from duet.configs.errors import UserError
from duet.configs.rows import load_rows
from duet.configs.schema import EvalConfig, RunConfig
from duet.inference.engine import Engine
from duet.inference.model import adapter_stage, load_adapter, load_pipeline
from duet.inference.rollout import Request
from duet.rewards.base import RewardInput, score
from duet.rewards.registry import load_rewards
from duet.train.prompts import derive_seed
from tqdm import tqdm

_SEED = 2**31  # far from any training seed; the same for every model


def evaluate(config: RunConfig, models: Sequence[tuple[str, ...]], output: Path) -> dict[str, Any]:
    """Evaluate the base and then each model (a tuple of checkpoints to load together).

    Pictures go to `output/<model>/`. Every model gets the same prompts and seeds, so
    differences to the base are paired.
    """
    rows = load_rows(config.data.eval)
    model_names = labels(models)
    for checkpoints in models:  # what is wrong is told before hours of sampling
        stages = [adapter_stage(c) for c in checkpoints]
        if len(set(stages)) < len(stages):
            raise UserError(
                f"--checkpoint {','.join(checkpoints)} joins adapters of {' and '.join(stages)}: "
                "give one of each stage"
            )
    rewards = load_rewards((*config.rewards, *config.eval.rewards))
    results = {
        "stage": config.stage,
        "confidence": config.eval.confidence,
        "prompts": [r["prompt"] for r in rows],
        "rows": [],
    }
    for name, checkpoints in zip(["base", *model_names], [(), *models], strict=True):
        images = _generate(config, checkpoints, rows)
        scores = _score(rewards, rows, images)
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for i, prompt_images in enumerate(images):
            for n, image in enumerate(prompt_images):
                path = folder / f"{i:03d}-{n}.png"
                image.save(path)
                paths.append(str(path.relative_to(output)))
        base = results["rows"][0]["scores"] if results["rows"] else None
        results["rows"].append(
            {
                "model": name,
                "checkpoints": list(checkpoints),
                "images": paths,
                "scores": scores,
                "metrics": {
                    k: _summary(v, base and base[k], config.eval) for k, v in scores.items()
                },
            }
        )
    return results


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


def _generate(config: RunConfig, checkpoints: Sequence[str], rows: Sequence[dict]) -> list[list]:
    pipeline = load_pipeline(config.model.path, config.model.dtype, config.model.device)
    for checkpoint in checkpoints:
        load_adapter(pipeline, checkpoint)
    engine = Engine(pipeline, config.sampling, batch_size=config.rollout.batch_size)
    count = config.eval.images_per_prompt
    requests = [
        Request(
            row["prompt"],
            tuple(derive_seed(_SEED, i, n) for n in range(count)),
            config.sampling.height,
            config.sampling.width,
        )
        for i, row in enumerate(rows)
    ]
    images = [rollout.images for rollout in engine.generate(requests)]
    del pipeline, engine
    gc.collect()  # the next model must fit in its place
    return images


def _score(rewards: dict, rows: Sequence[dict], images: Sequence[list]) -> dict[str, list]:
    """Per reward [prompts, images]; NaN where it could not be scored."""
    inputs = [
        RewardInput(image, row["prompt"], row)
        for row, prompt_images in zip(rows, images, strict=True)
        for image in prompt_images
    ]
    sizes = [len(prompt_images) for prompt_images in images]
    return {
        name: np.reshape(score(reward, name, inputs, sizes), (len(rows), -1)).tolist()
        for name, reward in tqdm(rewards.items(), desc="scoring", leave=False)
    }


def _summary(scores: list, base: list | None, config: EvalConfig) -> dict:
    """Means over prompts; `perfect`: the share of the scored pictures that score exactly 1."""
    values, single = _prompt_means(scores), np.array(scores, dtype=float)
    summary = {
        "mean": float(np.nanmean(values)),
        "interval": bootstrap_interval(values, config),
        "perfect": float((single == 1).sum() / max(1, (~np.isnan(single)).sum())),
    }
    if base is not None:
        change = values - _prompt_means(base)
        summary["change"] = float(np.nanmean(change))
        summary["change_interval"] = bootstrap_interval(change, config)
    return summary


def _prompt_means(scores: list) -> np.ndarray:
    """[prompts, images] -> [prompts], over the pictures that could be scored."""
    table = np.array(scores, dtype=float)
    known = ~np.isnan(table)
    total = np.where(known, table, 0.0).sum(-1)
    return np.where(known.any(-1), total / np.maximum(known.sum(-1), 1), np.nan)


def bootstrap_interval(values: Sequence[float], config: EvalConfig) -> list[float]:
    """Percentile bootstrap of the mean over prompts (Efron), NaN left out."""
    known = np.array([v for v in values if not np.isnan(v)])
    if not len(known):
        return [float("nan")] * 2
    rng = np.random.default_rng(0)
    picks = rng.integers(len(known), size=(config.bootstrap_samples, len(known)))
    tail = (1 - config.confidence) / 2
    return [float(q) for q in np.quantile(known[picks].mean(-1), [tail, 1 - tail])]


def text_table(results: dict[str, Any]) -> str:
    """Models by rewards; below the base, the paired change and its interval."""
    names = list(results["rows"][0]["metrics"])
    width = max(len(r["model"]) for r in results["rows"])
    lines = [" | ".join([" " * width, *(f"{n:>30}" for n in names)])]
    for row in results["rows"]:
        cells = [f"{_cell(row['metrics'][n]):>30}" for n in names]
        lines.append(" | ".join([row["model"].ljust(width), *cells]))
    return "\n".join(lines)


def _cell(metric: dict) -> str:
    if "change" not in metric:
        low, high = metric["interval"]
        return f"{metric['mean']:.3f} [{low:.3f}, {high:.3f}]"
    low, high = metric["change_interval"]
    return f"{metric['mean']:.3f} {metric['change']:+.3f} [{low:+.3f}, {high:+.3f}]"
