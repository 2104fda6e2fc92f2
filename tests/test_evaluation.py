"""Names and intervals of an evaluation; the whole of it runs in test_commands.py."""

import json

import numpy as np
import pytest

from duet.configs.errors import UserError
from duet.configs.schema import EvalConfig
from duet.train.evaluation import labels
from duet.train.statistics import bootstrap_interval, summarise


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


def test_a_picture_without_a_score_is_no_imperfect_one():
    scores = [[1.0, float("nan")], [0.5, float("nan")]]
    assert summarise(scores, None, EvalConfig()).perfect.mean == 0.5


def test_perfect_has_an_interval_and_a_paired_change():
    base = [[1.0, 0.5], [0.2, 0.9], [0.5, 0.5], [1.0, 1.0]]
    after = [[1.0, 1.0], [1.0, 0.9], [float("nan"), None], [1.0, 1.0]]
    assert summarise(base, None, EvalConfig()).perfect.mean == pytest.approx(1.5 / 4)
    perfect = summarise(after, base, EvalConfig()).perfect
    assert perfect.mean == pytest.approx(2.5 / 3), "over the prompts that were scored"
    assert perfect.change == pytest.approx((0.5 + 0.5 + 0) / 3)
    low, high = perfect.change_interval
    assert 0 <= low < perfect.change < high <= 0.5
    assert bootstrap_interval([float("nan")], EvalConfig()) is None


def test_what_does_not_apply_is_left_out_of_means_and_pairs():
    base = [[0.5, 0.7], [None, None], [0.2, 0.4]]
    after = [[0.6, 0.8], [None, None], [0.3, float("nan")]]
    summary = summarise(after, base, EvalConfig())
    assert summary.mean == pytest.approx((0.7 + 0.3) / 2)
    assert summary.change == pytest.approx((0.1 + 0.0) / 2)
    assert json.loads(json.dumps(base)) == base, "null in the results"
