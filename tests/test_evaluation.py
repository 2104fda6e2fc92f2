"""Names and intervals of an evaluation; the whole of it runs in test_commands.py."""

import json

import numpy as np
import pytest

from duet.configs.errors import UserError
from duet.configs.schema import EvalConfig
from duet.train.labels import labels
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
    with pytest.raises(UserError, match="names one model twice"):
        labels([(ar, decoder), (decoder, f"{ar}/../checkpoint-2/")])


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/base"], ["base-2"]),
        (["/Index.HTML", "/results.json"], ["Index.HTML-2", "results.json-2"]),
        (["/runs/a b", "/runs/a_b", "/runs/A_B"], ["runs-a_b", "runs-a_b-2", "runs-A_B-3"]),
        (["/a/b-c", "/a-b/c"], ["a-b-c", "a-b-c-2"]),
        (["/.lock", "/..x"], ["_lock", "_.x"]),
        (["/runs/\n/<b>|:*?"], ["_-_b_____"]),
        (["/runs/é\udcff"], ["runs-__"]),
        (["/" + "x" * 200 + "y", "/" + "z" * 200 + "y"], ["x" * 99 + "y", "z" * 99 + "y"]),
        (["/a" + "x" * 200, "/b" + "x" * 200], ["x" * 100, "x" * 98 + "-2"]),
    ],
)
def test_a_models_name_is_a_folders_whatever_its_checkpoints_are_called(folders, names, tmp_path):
    assert labels([(folder,) for folder in folders]) == names
    for name in ["base", "index.html", "results.json", "before_after.png", *names]:
        (tmp_path / name.casefold()).mkdir()


def test_joined_names_are_no_longer_than_a_folders_may_be(tmp_path):
    [name] = labels([("/a/" + "x" * 200, "/a/" + "y" * 200)])
    assert len(name) == 100


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


@pytest.mark.filterwarnings("error")
def test_the_mean_of_nothing_is_no_number_and_no_warning():
    nothing = [[float("nan")], [float("nan")]]
    made = summarise(nothing, [[0.5], [0.5]], EvalConfig())
    assert (made.mean, made.change, made.interval, made.change_interval) == (None,) * 4
