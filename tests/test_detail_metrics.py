"""BRISQUE against an independent implementation, and pyiqa with and without pyiqa."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.rewards.base import RewardInput
from duet.rewards.brisque import GREY, Brisque, brisque, contrasts
from duet.rewards.registry import load_reward, load_rewards
from duet.train.tiny.specimens import CARD, write
from tests.brisque_reference import photograph, pictures
from tests.conftest import ROOT
from tests.pictures import CLEAN, DAMAGE, PICTURES, damaged


@pytest.fixture
def row(tmp_path):
    return write(tmp_path)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("seed", range(3))
def test_brisque_falls_with_every_step_of_damage_to_a_photograph(seed, kind):
    images = damaged(Image.fromarray(photograph(seed)), kind)
    steps = Brisque()([RewardInput(i, "", {}) for i in images])
    assert steps == sorted(steps, reverse=True) and steps[0] - steps[-1] > 0.2


def test_brisque_agrees_with_an_independent_implementation():
    """On 20 pictures; tests/brisque_reference.py tells whose numbers and how they were made."""
    theirs = json.loads((ROOT / "tests" / "brisque_reference.json").read_text())
    ours = [brisque(Image.fromarray(p)) for p in pictures()]
    assert len(theirs) == 20 and max(theirs) - min(theirs) > 50
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_brisque_takes_rounding_in_a_flat_area_for_no_contrast():
    picture = photograph(0)
    picture[:, 40:] = (217, 163, 130)  # one whose mean is off by rounding
    found = contrasts(picture.astype(float) @ GREY)
    assert (found[3:-3, 44:-3] == 0).all() and (found[:, :40] != 0).all()


@pytest.mark.parametrize("colour", ["black", "white", (200, 40, 40)])
def test_a_flat_picture_has_no_brisque(colour):
    flat = Image.new("RGB", (96, 64), colour)
    assert math.isnan(Brisque()([RewardInput(flat, "", {})])[0])


def test_brisque_is_cut_to_its_range(monkeypatch):
    for raw, expected in ((-30, 1), (25, 0.75), (150, 0)):
        monkeypatch.setattr("duet.rewards.brisque.brisque", lambda image, raw=raw: raw)
        assert Brisque()([RewardInput(CLEAN, "", {})]) == [expected]


def test_pyiqa_that_is_not_installed_is_told_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(UserError, match=r"pip install 'duet\[pyiqa\]'"):
        load_rewards([RewardConfig("pyiqa", args={"metric": "psnr"})])


@pytest.mark.parametrize(("lower_better", "sign"), [(True, -1), (False, 1)])
@pytest.mark.parametrize("mode", ["NR", "FR"])
def test_pyiqa_by_a_stand_in(monkeypatch, row, mode, lower_better, sign):
    """What the reward asks of pyiqa, where pyiqa is not installed."""

    class Metric:
        metric_mode = mode

        def __call__(self, *pictures):
            assert [p.shape for p in pictures] == [(1, 3, 64, 96)] * (1 if mode == "NR" else 2)
            return pictures[0].mean()

    def create_metric(name, device):
        metric = Metric()
        metric.lower_better = lower_better
        return metric

    module = SimpleNamespace(list_models=lambda: ["mean"], create_metric=create_metric)
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    reward = load_reward(RewardConfig("pyiqa", args={"metric": "mean", "device": "cpu"}))
    scored, alone = reward([RewardInput(CLEAN, "", row), RewardInput(CLEAN, "", {})])
    assert scored == pytest.approx(sign * np.asarray(CLEAN).mean() / 255, rel=1e-5)
    assert (alone is None) == (mode == "FR")


def test_pyiqa_metrics_are_higher_for_better(row):
    pytest.importorskip("pyiqa", reason="an extra: pip install 'duet[pyiqa]'")
    for metric in ("psnr", "ssim", "nlpd"):  # nlpd: lower is better; none needs weights
        reward = load_reward(RewardConfig("pyiqa", args={"metric": metric, "device": "cpu"}))
        mild, strong = reward(
            [RewardInput(PICTURES[n], CARD.prompt, row) for n in ("noise", "strong noise")]
        )
        assert mild > strong
        assert reward([RewardInput(CLEAN, CARD.prompt, {})])[0] is None  # no reference
    with pytest.raises(UserError, match="pyiqa metric 'nonsense': allowed are"):
        load_rewards([RewardConfig("pyiqa", args={"metric": "nonsense"})])
