"""Which order of turns learns most: AR then decoder, decoder then AR, or alternating?

    python -m duet.train.tiny.orders [--seeds 0 1 2] [--folder runs/orders]

Each run has the rollouts of `make quickstart`, 45 of the AR and 40 of the decoder, by the settings
of configs/tiny/both.yaml, and is then evaluated on the held-out prompts; what is there already is
not done again. Prints a table a measure: the change to the base with its paired interval.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

from duet.configs.load import read_tree

_ROOT = Path(__file__).resolve().parents[2]
_CONFIG = _ROOT / "configs" / "tiny" / "both.yaml"
_STEPS = {"ar": 45, "decoder": 40}
# turns of each order: part and rollouts before the next one
ORDERS = {
    "AR, then decoder": (("ar", 45), ("decoder", 40)),
    "decoder, then AR": (("decoder", 40), ("ar", 45)),
    "alternating": (("ar", 9), ("decoder", 8)),
}


def write_config(order: str, folder: Path) -> Path:
    """both.yaml with the order's turns."""
    tree = read_tree(_CONFIG)
    turns = {turn["part"]: turn for turn in tree["stages"]}
    tree["stages"] = [turns[part] | {"steps": steps} for part, steps in ORDERS[order]]
    tree["train"] |= {"max_steps": sum(_STEPS.values()), "save_steps": 85, "trackers": []}
    path = folder / "config-given.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def learn(order: str, seed: int, folder: Path) -> Path:
    """Train and evaluate; returns results.json."""
    folder = folder / f"{order.replace(', ', '-').replace(' ', '-')}-{seed}"
    results = folder / "report" / "results.json"
    if results.is_file():
        return results
    config, run = write_config(order, folder), folder / "run"
    _duet("train", config, f"seed={seed}", f"output_dir={run}", "train.resume=latest")
    newest = run / f"checkpoint-{sum(_STEPS.values())}"
    _duet("evaluate", config, "--checkpoint", newest, "--output", results.parent)
    return results


def _duet(command: str, *arguments: object) -> None:
    line = [sys.executable, "-m", "duet.launch.cli", command, *map(str, arguments)]
    subprocess.run(line, cwd=_ROOT, check=True)


def table(found: dict[str, list[dict]]) -> str:
    """A line an order and seed; `found`: the results of its seeds."""
    lines = []
    for order, seeds in found.items():
        for seed, results in enumerate(seeds):
            metrics = results["rows"][-1]["metrics"]
            cells = [_change(told) for told in metrics.values()]
            if not lines:
                lines = [f"| order | seed | {' | '.join(metrics)} |"]
                lines += ["|---" * (len(metrics) + 2) + "|"]
            lines.append(f"| {order} | {seed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _change(told: dict) -> str:
    low, high = told["change_interval"]
    return f"{told['change']:+.3f} [{low:+.3f}, {high:+.3f}]"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/orders"))
    options = parser.parse_args(arguments)
    folder, found = options.folder.resolve(), {order: [] for order in ORDERS}
    for seed in options.seeds:
        for order, results in found.items():
            results.append(json.loads(learn(order, seed, folder).read_text()))
    print(table(found))


if __name__ == "__main__":
    main()
