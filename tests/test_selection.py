"""Evaluations while a run trains: they move nothing, and the best checkpoint stays."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from duet.configs.errors import UserError
from duet.configs.load import load_config
from duet.train import selection
from duet.train.best import Best
from duet.train.evaluation import evaluate
from duet.train.held_out import evaluation_id, evaluation_metrics
from duet.train.memory import phases, step_of
from duet.train.signals import Stopped
from tests.conftest import MODEL, ROOT, SHORT, adapter_weights, held_out_edits, train

SHARP, DRAWS = "duet.train.tiny.hackable.Sharpness", "tests.sample_rewards.Draws"
STAGES = (
    f"stages=[{{part: decoder, steps: 1, rewards: [{{name: {SHARP}}}]}},"
    f" {{part: ar, steps: 1, rewards: [{{name: {DRAWS}, weight: 0.5}}], lora: {{dropout: 0.2}}}}]"
)
STEPS = 3
EVERY = ["train.eval_steps=1", f"train.metric_for_best_model={SHARP.rpartition('.')[2]}"]


def make(folder: Path, *overrides: str, stage: str = "both"):
    small = [
        f"output_dir={folder}", *SHORT, "rollout.prompts_per_step=1", "rollout.num_generations=4",
        "rollout.batch_size=8", "rollout.priors=auto", "optim.per_device_train_batch_size=4", "train.trackers=[]",
        "optim.lr_scheduler_type=constant", "sampling.num_inference_steps=4", STAGES,
        f"train.max_steps={STEPS}", f"train.save_steps={STEPS}", "eval.images_per_prompt=2",
        f"eval.rewards=[{{name: {DRAWS}, label: again}}]", f"data.eval={folder.parent / 'eval.jsonl'}",
    ]  # fmt: skip
    return load_config(ROOT / "configs" / "tiny" / f"{stage}.yaml", [*small, *overrides])


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def figures(run: Path, evaluations: bool) -> list[dict]:
    """What does not depend on the clock."""
    told = [s for s in lines(run) if ("evaluation" in s) == evaluations]
    clock = ("seconds", "samples_per_second")
    return [{k: v for k, v in s.items() if not k.endswith(clock)} for s in told]


def weights(checkpoint: Path) -> list[dict[str, torch.Tensor]]:
    return [adapter_weights(checkpoint / part) for part in ("decoder", "ar")]


def same(one: Path, other: Path) -> bool:
    pairs = list(zip(weights(one), weights(other), strict=True))
    assert all(a.keys() == b.keys() for a, b in pairs)
    return all(torch.equal(a[k], b[k]) for a, b in pairs for k in a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run without evaluations, with them, and stopped within the second one."""
    folder = tmp_path_factory.mktemp("selection")
    held_out = "".join(json.dumps(row) + "\n" for row in held_out_edits(3))
    (folder / "eval.jsonl").write_text(held_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train(make(folder / "plain"))
        train(make(folder / "whole", *EVERY, "train.save_total_limit=1"))
        true, calls = selection.measure, []

        def stopped(training):
            calls.append(None)
            if len(calls) == 2:
                raise Stopped(15)
            return true(training)

        with patch.context() as within, pytest.raises(UserError, match="SIGTERM ended the run"):
            within.setattr(selection, "measure", stopped)
            train(make(folder / "stopped", *EVERY))
        shutil.copytree(folder / "stopped", folder / "resumed")
        train(make(folder / "resumed", *EVERY, "train.resume=latest"))
    return folder


def test_a_run_does_not_know_that_it_is_evaluated(runs):
    plain, whole = runs / "plain", runs / "whole"
    assert same(plain / "checkpoint-3", whole / "checkpoint-3")
    assert figures(plain, False) == figures(whole, False)
    assert [s["step"] for s in figures(whole, True)] == [1, 2, 3] and not figures(plain, True)
    assert not (plain / "best.json").exists()


def test_the_best_checkpoint_is_named_and_stays(runs):
    whole = runs / "whole"
    values = [s["eval/rewards/Sharpness/mean"] for s in lines(whole) if s["stage"] == "eval"]
    assert len(set(values)) == 3, "each step learns"
    best = values.index(max(values)) + 1
    assert json.loads((whole / "best.json").read_text()) == {
        "checkpoint": f"checkpoint-{best}", "step": best,
        "metric": "eval/rewards/Sharpness/mean", "value": max(values),
    }  # fmt: skip
    left = {path.name for path in whole.glob("checkpoint-*")}
    assert left == {f"checkpoint-{best}", "checkpoint-3"}, "save_total_limit is 1"
    assert f"best by eval/rewards/Sharpness/mean: {whole / f'checkpoint-{best}'}" in (
        (whole / "train.log").read_text()
    )


def test_its_value_is_what_an_evaluation_of_the_checkpoint_finds(runs, tmp_path):
    whole = runs / "whole"
    told = json.loads((whole / "best.json").read_text())
    found = evaluate(make(whole), [(str(whole / told["checkpoint"]),)], tmp_path / "report")
    assert found.rows[1].metrics["Sharpness"].mean == pytest.approx(told["value"], rel=1e-5)
    assert found.rows[0].metrics["Sharpness"].mean != pytest.approx(told["value"], rel=1e-3)


def test_what_ends_in_an_evaluation_goes_on_exactly(runs):
    stopped, resumed, whole = runs / "stopped", runs / "resumed", runs / "whole"
    assert [(s["step"], s["stage"]) for s in lines(stopped)] == [
        (1, "decoder"), (1, "eval"), (2, "ar"),
    ]  # fmt: skip
    assert same(whole / "checkpoint-3", resumed / "checkpoint-3")
    assert [(s["step"], s["stage"]) for s in lines(resumed)] == [
        (1, "decoder"), (1, "eval"), (2, "ar"), (2, "eval"), (3, "decoder"), (3, "eval"),
    ]  # fmt: skip
    for evaluations in (False, True):
        assert figures(resumed, evaluations) == figures(whole, evaluations)
    assert (resumed / "best.json").read_text() == (whole / "best.json").read_text()


def test_what_was_evaluated_is_not_evaluated_again(runs, monkeypatch):
    done = runs / "resumed"
    before = (done / "metrics.jsonl").read_text(), (done / "best.json").read_text()
    (done / "best.json").unlink()
    train(make(done, *EVERY, "train.resume=latest"))
    assert before == ((done / "metrics.jsonl").read_text(), (done / "best.json").read_text())


def best_of(folder: Path, values: list, *overrides: str, id: str = "same", there=None) -> Best:
    best = Best(make(folder, *overrides), id)
    for step in range(1, len(values) + 1) if there is None else there:
        (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
        (folder / f"checkpoint-{step}" / "trainer_state.json").touch()
    key = best.metric.key
    history = [{"step": 1, "stage": "ar", "reward": 9.0}]
    history += [
        {"step": step, "stage": "eval", "evaluation": "same", key: value}
        for step, value in enumerate(values, 1)
    ]
    best.recall(history, folder)
    return best


@pytest.mark.parametrize(
    ("values", "overrides", "step"),
    [
        ([0.1, 0.3, 0.2], [], 2),
        ([0.3, 0.3, 0.3], [], 1),  # a tie keeps the older
        ([None, 0.1, None], [], 2),
        ([math.nan, -1.0, math.nan], [], 2),
        ([None, math.nan], [], None),
        ([], [], None),
        ([-0.5, 0.0], [], 2),
        ([0.2, 0.1, 0.1], [f"eval.rewards=[{{name: {DRAWS}, label: less, weight: -1}}]",
                           "train.metric_for_best_model=less"], 2),
        ([0.2, 0.1, 0.3], ["train.metric_for_best_model=again"], 3),
    ],
)  # fmt: skip
def test_which_is_the_best(tmp_path, values, overrides, step):
    best = best_of(tmp_path, values, *overrides)
    assert (best.held and best.held.step) == step
    assert (tmp_path / "best.json").exists() == (step is not None)


def test_other_prompts_and_lost_checkpoints_are_no_rivals(tmp_path):
    assert best_of(tmp_path, [0.9, 0.5], there=[2]).held.step == 2, "the first was removed"
    assert best_of(tmp_path, [0.9, 0.5], id="other").held is None
    assert not (tmp_path / "best.json").exists(), "what it named cannot be compared any more"


def test_the_best_of_a_run_that_goes_on_elsewhere_is_found_from_there(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    best_of(tmp_path / "a", [0.1, 0.9])
    best, key = Best(make(tmp_path / "b"), "same"), "eval/reward"
    best.recall([{"step": 2, "stage": "eval", "evaluation": "same", key: 0.9}], tmp_path / "a")
    named = json.loads((tmp_path / "b" / "best.json").read_text())["checkpoint"]
    assert (tmp_path / "b" / named).samefile(tmp_path / "a" / "checkpoint-2")


def test_what_makes_evaluations_comparable(tmp_path, rows):
    config = make(tmp_path)
    id = evaluation_id(config, rows[:2])
    assert id == evaluation_id(make(tmp_path, "train.eval_steps=7", "seed=3"), rows[:2])
    for other in (
        evaluation_id(config, rows[:3]),
        evaluation_id(make(tmp_path, "eval.images_per_prompt=3"), rows[:2]),
        evaluation_id(make(tmp_path, f"eval.rewards=[{{name: {SHARP}, label: b}}]"), rows[:2]),
        evaluation_id(make(tmp_path, STAGES.replace("0.5", "0.6")), rows[:2]),
    ):
        assert other != id


@pytest.mark.parametrize(
    ("sharp", "draws", "expected"),
    [
        ([[1.0, 3.0], [4.0, 4.0]], [[0.2, 0.2], [0.4, 0.4]], (3.0, 0.3, 3.0 + 0.15)),
        # does not apply: the others' sum
        ([[None, None], [4.0, 4.0]], [[0.2, 0.2], [0.4, 0.4]], (4.0, 0.3, (0.1 + 4.2) / 2)),
        # not scored: without that picture
        ([[math.nan, 3.0], [4.0, 4.0]], [[0.2, 0.2], [0.4, 0.4]], (3.5, 0.3, (3.1 + 4.2) / 2)),
        # too many not scored, of those that it applies to
        ([[math.nan, None], [math.nan, 4.0]], [[0.2, 0.2], [0.4, 0.4]], (None, 0.3, None)),
        ([[None, None], [None, None]], [[0.2, 0.2], [0.4, 0.4]], (None, 0.3, 0.15)),
    ],
)  # fmt: skip
def test_figures_of_an_evaluation(tmp_path, sharp, draws, expected):
    told = evaluation_metrics(make(tmp_path), {"Sharpness": sharp, "Draws": draws})
    names = "eval/rewards/Sharpness/mean", "eval/rewards/Draws/mean", "eval/reward"
    assert [told[name] for name in names] == [
        pytest.approx(math.nan if value is None else value, nan_ok=True) for value in expected
    ]


def test_the_plan_counts_evaluations():
    """A decoder's run samples a prior a prompt; an evaluation fills batches with the AR."""
    small = ["rollout.prompts_per_step=1", "optim.per_device_train_batch_size=8"]
    path = ROOT / "configs" / "tiny" / "decoder.yaml"
    config = load_config(path, [*small, "train.eval_steps=5"])
    found = {p.name: p.total for p in phases(config, step_of(config, MODEL, 1), 1)}
    assert found["held-out tokens"] > found["AR tokens"]
    assert found["held-out latents"] > found["latents"]


def test_a_metric_that_nothing_measures_is_refused(tmp_path):
    with pytest.raises(UserError, match="metric_for_best_model = 'ocr' .* one of reward, Sharp"):
        make(tmp_path, "train.metric_for_best_model=ocr")
