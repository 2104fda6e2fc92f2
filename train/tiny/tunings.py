"""Full tuning or LoRA, and the moving average or the last weights?

    python -m duet.train.tiny.tunings [--seeds 0 1 2] [--folder runs/tunings]

Each run has the rollouts of `make quickstart`, by the settings of configs/tiny/decoder.yaml or
ar.yaml, with an average beside the weights, which changes no training: a run is evaluated by both
on the held-out prompts. What is there already is not done again. Prints two tables of changes with
paired intervals; the seeds' models together ("all") are compared prompt by prompt.
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path

from duet.inference.trained import AVERAGE
from duet.train.tiny.comparison import (
    CONFIGS,
    STEPS,
    Line,
    Scores,
    duet,
    evaluate,
    options,
    pooled,
    table,
)

# chosen on training prompts that were left out, by another seed: configs/tiny/RESULTS.md
_DECAY = 0.95
_LEARNING_RATES = {"decoder": 1e-4, "ar": 1e-4}  # of full tuning
TUNINGS = ("LoRA", "full")
Model = tuple[str, str]  # stage and tuning
MODELS: tuple[Model, ...] = tuple(product(STEPS, TUNINGS))
Found = dict[Model, dict[int, Scores]]  # of a seed


def settings(stage: str, tuning: str, seed: int) -> list[str]:
    """Overrides of the stage's shipped config."""
    steps = STEPS[stage]
    given = [f"seed={seed}", f"train.max_steps={steps}", f"train.save_steps={steps}"]
    given += ["train.trackers=[]", f"average={{decay: {_DECAY}, start: 0}}"]
    if tuning == "full":
        given += ["tuning=full", f"optim.learning_rate={_LEARNING_RATES[stage]}"]
    return given


def train(stage: str, tuning: str, seed: int, folder: Path) -> Path:
    """The checkpoint of its end."""
    run = folder / f"{stage}-{tuning}-{seed}"
    newest = run / f"checkpoint-{STEPS[stage]}"
    if not newest.is_dir():
        given = settings(stage, tuning, seed)
        config = CONFIGS / f"{stage}.yaml"
        duet("train", config, *given, f"output_dir={run}", "train.resume=latest")
    return newest


def table_of_tunings(last: Found, base: Scores) -> str:
    """`last`: by the last weights."""
    lines = _to_base(last, base)
    for stage in STEPS:
        full, lora = (_all_seeds(last[stage, tuning]) for tuning in ("full", "LoRA"))
        lines.append(Line((stage, "full against LoRA", "all"), full, lora))
    return table(("stage", "tuning", "seed"), lines)


def table_of_averages(average: Found, last: Found, base: Scores) -> str:
    """The averages of the runs whose last weights are in the other table."""
    lines = _to_base(average, base)
    for (stage, tuning), seeds in average.items():
        names = (stage, f"{tuning}: average against last", "all")
        lines.append(Line(names, _all_seeds(seeds), _all_seeds(last[stage, tuning])))
    return table(("stage", "average of", "seed"), lines)


def _to_base(found: Found, base: Scores) -> list[Line]:
    lines = []
    for model, seeds in found.items():
        lines += [Line((*model, str(seed)), scores, base) for seed, scores in seeds.items()]
        lines.append(Line((*model, "all"), _all_seeds(seeds), base))
    return lines


def _all_seeds(seeds: Mapping[int, Scores]) -> Scores:
    return pooled(list(seeds.values()))


def main(arguments: list[str] | None = None) -> None:
    asked = options(__doc__, "runs/tunings", arguments)
    last: Found = {model: {} for model in MODELS}
    average: Found = {model: {} for model in MODELS}
    for stage, seed in product(STEPS, asked.seeds):
        lasts = [train(stage, tuning, seed, asked.folder) for tuning in TUNINGS]
        checkpoints = [*lasts, *(path / AVERAGE for path in lasts)]
        report = asked.folder / f"{stage}-{seed}"
        base, *trained = evaluate(CONFIGS / "decoder.yaml", checkpoints, report)
        for (found, tuning), scores in zip(product((last, average), TUNINGS), trained, strict=True):
            found[stage, tuning][seed] = scores
    print(table_of_tunings(last, base), end="\n\n")
    print(table_of_averages(average, last, base))


if __name__ == "__main__":
    main()
