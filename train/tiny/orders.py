"""Which order of turns learns most: AR then decoder, decoder then AR, or alternating?

    python -m duet.train.tiny.orders [--seeds 0 1 2] [--folder runs/orders]

Each run has the rollouts of `make quickstart`, 45 of the AR and 40 of the decoder, by the settings
of configs/tiny/both.yaml, and is then evaluated on the held-out prompts; what is there already is
not done again. Prints a table: each measure's change to the base with its paired interval.
"""

from pathlib import Path

import yaml

from duet.configs.load import read_tree
from duet.train.tiny.comparison import CONFIGS, STEPS, Line, duet, evaluate, options, table

_ALL = sum(STEPS.values())
# turns of each order: part and rollouts before the next one
ORDERS = {
    "AR, then decoder": (("ar", 45), ("decoder", 40)),
    "decoder, then AR": (("decoder", 40), ("ar", 45)),
    "alternating": (("ar", 9), ("decoder", 8)),
}


def write_config(order: str, folder: Path) -> Path:
    """both.yaml with the order's turns."""
    tree = read_tree(CONFIGS / "both.yaml")
    turns = {turn["part"]: turn for turn in tree["stages"]}
    tree["stages"] = [turns[part] | {"steps": steps} for part, steps in ORDERS[order]]
    tree["train"] |= {"max_steps": _ALL, "save_steps": _ALL, "trackers": []}
    path = folder / "given.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def learn(order: str, seed: int, folder: Path) -> Line:
    """Train and evaluate."""
    folder = folder / f"{order.replace(', ', '-').replace(' ', '-')}-{seed}"
    config, run = write_config(order, folder), folder / "run"
    newest = run / f"checkpoint-{_ALL}"
    if not newest.is_dir():
        duet("train", config, f"seed={seed}", f"output_dir={run}", "train.resume=latest")
    base, trained = evaluate(config, [newest], folder / "report")
    return Line((order, str(seed)), trained, base)


def main(arguments: list[str] | None = None) -> None:
    asked = options(__doc__, "runs/orders", arguments)
    lines = [learn(order, seed, asked.folder) for seed in asked.seeds for order in ORDERS]
    print(table(("order", "seed"), lines))


if __name__ == "__main__":
    main()
