"""The comparisons of the tiny model: which runs they make, and the tables of what they find."""

import json
from pathlib import Path

import pytest

from duet.configs.load import load_config
from duet.train.tiny import comparison, orders, tunings
from duet.train.tiny.comparison import Line
from tests.conftest import ROOT

MEASURES = ("OCR", "alignment", "colour obedience", "fidelity")


def scores(*prompts: list[float | None]):
    return dict.fromkeys(MEASURES, list(prompts))


BASE = scores([0.0, 0.0], [0.0, 0.0])


def cells(table: str) -> list[list[str]]:
    """Without the line below the heads."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert set(rows.pop(1)) == {"---"} and len({len(row) for row in rows}) == 1
    return rows


def test_a_table_has_paired_changes_with_intervals_over_prompts():
    one, other = scores([1.0, 0.5], [0.25, None]), scores([0.5, 0.5], [0.0, 0.0])
    heads, line = cells(comparison.table(("order", "seed"), [Line(("a", "1"), one, other)]))
    assert heads == ["order", "seed", *MEASURES]
    assert line == ["a", "1", *["+0.250 [+0.250, +0.250]"] * 4]


def test_seeds_are_pooled_prompt_by_prompt():
    assert comparison.pooled([scores([0.0], [1.0]), scores([2.0], [3.0])]) == scores(
        [0.0, 2.0], [1.0, 3.0]
    )


@pytest.mark.parametrize("tuning", tunings.TUNINGS)
@pytest.mark.parametrize("stage", ["decoder", "ar"])
def test_tunings_train_with_a_quickstarts_budget_and_an_average(stage, tuning):
    path = ROOT / "configs" / "tiny" / f"{stage}.yaml"
    shipped, config = load_config(path), load_config(path, tunings.settings(stage, tuning, 2))
    assert (config.seed, config.tuning) == (2, tuning.lower())
    assert config.train.max_steps == {"decoder": 40, "ar": 45}[stage]
    assert config.average is not None
    same = config.optim.learning_rate == shipped.optim.learning_rate
    assert same == (tuning == "LoRA"), "each has a learning rate of its own"
    for section in ("sampling", "rollout", "sde", "grpo", "lora", "rewards", "eval"):
        assert getattr(config, section) == getattr(shipped, section)


def test_the_tables_of_tunings_and_averages():
    found = {
        model: {seed: scores([i + seed / 10], [i + seed / 10]) for seed in (1, 2)}
        for i, model in enumerate(tunings.MODELS)
    }
    half = {model: {seed: scores([0.5], [0.5]) for seed in seeds} for model, seeds in found.items()}
    heads, *rows = cells(tunings.table_of_tunings(found, BASE))
    assert heads == ["stage", "tuning", "seed", *MEASURES]
    told = {tuple(row[:3]): row[3].split()[0] for row in rows}
    assert told["decoder", "LoRA", "2"] == "+0.200"
    assert told["ar", "full", "1"] == "+3.100"
    assert told["ar", "full", "all"] == "+3.150"
    assert told["ar", "full against LoRA", "all"] == "+1.000"
    assert len(told) == len(rows) == 12 + 2

    heads, *rows = cells(tunings.table_of_averages(half, found, BASE))
    assert heads == ["stage", "average of", "seed", *MEASURES]
    told = {tuple(row[:3]): row[3].split()[0] for row in rows}
    assert told["ar", "full", "1"] == "+0.500"
    assert told["ar", "full: average against last", "all"] == "-2.650"
    assert len(told) == len(rows) == 12 + 4


def done(folder: Path, runs: dict[str, int], report: str, *models: float) -> None:
    """Runs that have ended with so many steps, and a report of all their models."""
    for run, steps in runs.items():
        (folder / run / f"checkpoint-{steps}").mkdir(parents=True)
    names = ("ocr", "alignment", "ColourObedience", "fidelity", "aesthetic")
    rows = [{"scores": dict.fromkeys(names, [[score]])} for score in (0.0, *models)]
    (folder / report).mkdir(parents=True)
    (folder / report / "results.json").write_text(json.dumps({"rows": rows}))


def test_tunings_that_are_there_are_told_and_not_made_again(tmp_path, capsys):
    for stage, steps in (("decoder", 40), ("ar", 45)):
        runs = {f"{stage}-{tuning}-7": steps for tuning in tunings.TUNINGS}
        done(tmp_path, runs, f"{stage}-7", 0.1, 0.3, 0.15, 0.45)
    tunings.main(["--seeds", "7", "--folder", str(tmp_path)])
    tuned, averaged = map(cells, capsys.readouterr().out.strip().split("\n\n"))
    assert tuned[1][:4] == ["decoder", "LoRA", "7", "+0.100 [+0.100, +0.100]"]
    assert [row[3].split()[0] for row in tuned if row[2] == "7"] == ["+0.100", "+0.300"] * 2
    assert [row[3].split()[0] for row in averaged if row[2] == "7"] == ["+0.150", "+0.450"] * 2


def test_orders_that_are_there_are_told_and_not_made_again(tmp_path, capsys):
    for score, order in enumerate(("AR-then-decoder", "decoder-then-AR", "alternating")):
        done(tmp_path / f"{order}-7", {"run": 85}, "report", score)
    orders.main(["--seeds", "7", "--folder", str(tmp_path)])
    _, *rows = cells(capsys.readouterr().out.strip())
    assert [row[:2] for row in rows] == [[order, "7"] for order in orders.ORDERS]
    assert [row[2].split()[0] for row in rows] == ["+0.000", "+1.000", "+2.000"]
