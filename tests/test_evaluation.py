"""Names, intervals and shares of an evaluation; its command runs in test_commands.py."""

import numpy as np
import pytest
from duet.configs.errors import UserError
from duet.configs.schema import EvalConfig
from duet.train.evaluation import bootstrap_interval, evaluate, labels


def test_every_model_has_a_name_of_its_own():
    ar, decoder = "/runs/a/ar/checkpoint-2", "/runs/a/decoder/checkpoint-4"
    assert labels([]) == []
    assert labels([("/checkpoint-5",)]) == ["checkpoint-5"]
    assert labels([(ar,), (ar, decoder)]) == [
        "ar-checkpoint-2",
        "ar-checkpoint-2+decoder-checkpoint-4",
    ]
    assert labels([(ar,), ("/runs/b/ar/checkpoint-2",)]) == [
        "a-ar-checkpoint-2",
        "b-ar-checkpoint-2",
    ]
    with pytest.raises(UserError, match="names one model twice"):
        labels([(ar,), (ar,)])


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(2, 1, 400)
    low, high = bootstrap_interval([*values, float("nan")], EvalConfig())
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_a_picture_without_a_score_is_no_imperfect_one(small_run, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a red card"}\n{"prompt": "a blue card"}\n')
    rewards = (
        "rewards=[{name: tests.sample_rewards.Scores, args: {scores: [1.0, .nan, 0.5, .nan]}}]"
    )
    prompts = f"data.eval={tmp_path / 'rows.jsonl'}"
    config = small_run("decoder", prompts, rewards, "eval={images_per_prompt: 2}")
    [row] = evaluate(config, [], tmp_path / "report")["rows"]
    assert row["metrics"]["Scores"]["perfect"] == 0.5
    assert row["metrics"]["Scores"]["mean"] == 0.75
