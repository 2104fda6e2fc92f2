"""A loss or gradient that is not finite reaches no weight, and no such weight a checkpoint."""

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from duet.configs.errors import UserError
from duet.train import update
from duet.train.checkpoint import complete_checkpoints
from duet.train.policy import Policy
from duet.train.setup import prepare
from tests.conftest import train

SHARP = "rewards=[{name: duet.train.tiny.hackable.Sharpness}]"


def weights(checkpoint):
    return load_file(next((checkpoint / "adapter").glob("*.safetensors")))


def spoil(monkeypatch, calls, factor) -> None:
    """The losses of these micro-batches, counted from 1, times `factor`."""
    true, count = update.policy_loss, []

    def spoiled(*given):
        count.append(None)
        made = true(*given)
        return replace(made, loss=made.loss * factor) if len(count) in calls else made

    monkeypatch.setattr(update, "policy_loss", spoiled)


def test_one_bad_micro_batch_skips_its_whole_update(small_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    spoil(monkeypatch, {3}, math.inf)  # two micro-batches an update, one update a step
    linear = "optim.lr_scheduler_type=linear"
    train(small_run("decoder", SHARP, linear, "train.max_steps=3"))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [s["updates/skipped"] for s in steps] == [0, 1, 0]
    assert steps[1]["grad_norm"] is None and steps[2]["grad_norm"] > 0
    assert steps[0]["learning_rate"] == steps[1]["learning_rate"] > steps[2]["learning_rate"]
    first, second, third = (weights(c) for c in complete_checkpoints(run))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, third[name]) for name, value in first.items())
    kept = run / "skipped" / "step-2" / "process-0"
    samples = json.loads((kept / "samples.json").read_text())
    assert len(samples) == 8, "both micro-batches of the update"
    assert Image.open(kept / samples[0]["image"]).size == (96, 64)
    assert samples[0].keys() == {
        "image", "prompt", "seed", "rewards", "advantage", "sampled_logprobs", "trained_logprobs"
    }  # fmt: skip
    assert not (run / "skipped" / "step-1").exists()


def test_the_gradients_root_mean_square_is_told(small_run, tmp_path):
    saved = train(small_run("decoder", SHARP, "train.max_steps=1"))
    told = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    count = sum(value.numel() for value in weights(saved).values())
    assert told["grad_rms"] == pytest.approx(told["grad_norm"] / math.sqrt(count))


@pytest.mark.parametrize(
    ("rate", "spoilt", "message"),
    [
        ("1e-4", range(3, 99), "3 updates in a row had a loss or gradient that is not finite"),
        ("1e4", (), "begin again with a smaller|not finite"),
    ],
)
def test_a_run_that_breaks_down_ends_with_finite_checkpoints(
    small_run, tmp_path, monkeypatch, rate, spoilt, message
):
    spoil(monkeypatch, spoilt, math.nan)
    settings = SHARP, "train.max_steps=6", f"optim.learning_rate={rate}"
    with pytest.raises(UserError, match=message) as ended:
        train(small_run("decoder", *settings))
    assert ended.value.status == 2
    for checkpoint in complete_checkpoints(tmp_path / "run"):
        assert all(v.isfinite().all() for v in weights(checkpoint).values())


def test_weights_that_are_not_finite_are_never_written(small_run, tmp_path, monkeypatch):
    true = Policy.step

    def overflows(self, loss):
        made = true(self, loss)
        with torch.no_grad():
            self.trained[0][0, 0] = math.inf
        return made

    monkeypatch.setattr(Policy, "step", overflows)
    with pytest.raises(UserError, match="weights are no longer finite: .* smaller") as ended:
        train(small_run("decoder", SHARP))
    assert "could not be written" not in str(ended.value), "none was tried"
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_an_optimizer_that_is_not_finite_is_never_written(small_run, tmp_path):
    AcceleratorState._reset_state(True)
    policy = prepare(small_run("decoder", SHARP)).at(0).policy
    policy.require_finite()
    moment = torch.tensor([math.nan])
    policy.optimizer.optimizer.state[policy.trained[0]] = {"exp_avg": moment}
    with pytest.raises(UserError, match="no longer finite"):
        policy.save(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("ar", "sampling.top_k=1", "sampling.top_k = 1 is out of range"),
        ("decoder", "rewards=[{name: ocr, weight: 0}]", "at least one that is not 0"),
    ],
)
def test_what_trains_nothing_is_told_before_the_first_step(small_run, stage, override, message):
    config = small_run(stage, override)  # an evaluation may ask for it
    with pytest.raises(UserError, match=message):
        train(config)
