"""Rewards: real OCR and towers, honest failures, nothing to be gained by cheating."""

import sys

import numpy as np
import pytest
from PIL import Image

from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.rewards.base import RewardInput, score
from duet.rewards.fidelity import Fidelity, quality
from duet.rewards.ocr import Ocr, text_score, wanted_texts
from duet.rewards.registry import load_reward, load_rewards
from duet.train.tiny.specimens import CARD, blurred, noisy
from duet.train.tiny.world import Card, Shape, draw
from tests.conftest import CLIP, ROOT
from tests.pictures import CLEAN, DAMAGE, damaged

OCR = {"limit_side_len": 192, "enlarge_to": 192}


def given(picture, prompt=CARD.prompt, **row):
    return RewardInput(picture, prompt, row)


@pytest.fixture(scope="module")
def ocr():
    return Ocr(**OCR, threads=2)


def test_ocr_reads_the_drawn_word(ocr):
    wrong = draw(Card("red", (), "white", "CHAT"))
    flat = Image.new("RGB", (96, 64), "red")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))
    scores = ocr([given(i) for i in (CLEAN, wrong, flat, noise)])
    assert scores[:3] == [1.0, 0.75, 0.0]
    assert scores[3] < 0.5


@pytest.mark.parametrize(
    ("wanted", "found", "expected"),
    [
        (["CAT"], ["CAT"], 1.0),
        (["CAT"], ["CA", "T"], 1.0),
        (["CAT"], ["CATCAT"], 0.0),  # surplus text costs
        (["CAT"], ["CATS"], 2 / 3),
        (["CAT"], [], 0.0),
        (["one", "two"], ["two", "one"], 1.0),  # any order
        (["a", "b", "c", "d", "e", "fg"], ["fg", "e", "d", "c", "b", "a"], 1.0),
        (["caf\u00e9"], ["CAFE\u0301"], 1.0),  # NFKC
        (["ＡＢ"], ["ab"], 1.0),
    ],
)
def test_text_score(wanted, found, expected):
    assert text_score(wanted, found) == pytest.approx(expected)


def test_case_may_count():
    assert text_score(["Cat"], ["CAT"], ignore_case=False) == pytest.approx(1 / 3)


def test_wanted_text_is_the_rows_or_the_quoted_spans():
    image = Image.new("RGB", (8, 8))
    assert wanted_texts(given(image, 'a "b" \u201cc\u201d 「d」')) == ["c", "b", "d"]
    assert wanted_texts(given(image, 'a "b"', text="x")) == ["x"]
    assert wanted_texts(given(image, 'a "b"', text=["x", "y"])) == ["x", "y"]


def test_a_prompt_without_text_is_not_scored(ocr):
    assert np.isnan(ocr([given(CLEAN, "a plain card")])[0])


@pytest.mark.parametrize("kind", DAMAGE)
def test_fidelity_orders_damage_with_a_reference(tmp_path, kind):
    path = tmp_path / "reference.png"
    CLEAN.save(path)
    fidelity = Fidelity(model=CLIP, pretrained=None)
    scores = fidelity([given(p, image=str(path)) for p in damaged(CLEAN, kind)])
    assert scores[0] == pytest.approx(1.0, abs=1e-5)
    assert scores == sorted(scores, reverse=True) and scores[0] - scores[-1] > 0.01


def test_quality_without_a_reference_cannot_be_raised_by_noise_or_flatness():
    assert quality(CLEAN) > 0.2
    assert quality(Image.new("RGB", (96, 64), "teal")) == 0
    noise = np.random.default_rng(1)
    for scale in (1, 8, 40, 120):
        pixels = 128 + noise.normal(0, scale, (64, 96, 3))
        assert quality(Image.fromarray(pixels.clip(0, 255).astype(np.uint8))) < 0.05
    for kind in ("blur", "noise"):
        steps = [quality(picture) for picture in damaged(CLEAN, kind)]
        assert steps == sorted(steps, reverse=True), kind
    assert quality(Image.blend(CLEAN, Image.new("RGB", CLEAN.size, "red"), 0.98)) < quality(CLEAN)


def test_fidelity_falls_to_quality_without_a_reference():
    assert Fidelity(model=CLIP, pretrained=None)([given(CLEAN)])[0] == quality(CLEAN)


def test_alignment_prefers_the_prompt_that_tells_the_colours():
    alignment = load_reward(RewardConfig("alignment", args={"model": CLIP, "pretrained": None}))
    others = [
        Card("green", CARD.shapes, "white", "CHAP"),
        Card("red", (Shape("circle", "purple", "on the left"),), "white", "CHAP"),
        Card("red", (Shape("circle", "blue", "on the right"),), "white", "CHAP"),
    ]
    right, *wrong = alignment([given(CLEAN, c.prompt) for c in (CARD, *others)])
    assert right > max(wrong)


def test_aesthetic_orders_damage():
    head = str(ROOT / "configs/tiny/judges/aesthetic.safetensors")
    aesthetic = load_reward(
        RewardConfig("aesthetic", args={"model": CLIP, "pretrained": None, "head": head})
    )
    pictures = [CLEAN, blurred(CLEAN, 2), noisy(CLEAN, 60)]
    clean, *worse = aesthetic([given(p) for p in pictures])
    assert clean > max(worse) + 0.1
    assert 0.5 < clean < 1.2


def test_a_reward_is_found_by_its_dotted_path():
    rewards = load_rewards([RewardConfig("tests.sample_rewards.Constant", args={"value": 0.5})])
    assert list(rewards) == ["Constant"]
    assert score(rewards["Constant"], "Constant", [given(CLEAN)] * 2, [2]) == [0.5, 0.5]


def test_a_reward_is_found_by_an_installed_entry_point(tmp_path, monkeypatch):
    package = tmp_path / "cheer-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: cheer\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[duet.rewards]\ncheer = cheer:Cheer\n")
    (tmp_path / "cheer.py").write_text(
        "class Cheer:\n    def __call__(self, i):\n        return [2.0] * len(i)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward(RewardConfig("cheer"))([1]) == [2.0]


def test_an_entry_point_that_cannot_be_imported_is_told(tmp_path, monkeypatch):
    package = tmp_path / "gloom-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: gloom\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[duet.rewards]\ngloom = gloom:Gloom\n")
    (tmp_path / "gloom.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="gloom:Gloom' cannot be imported: ZeroDivisionError"):
        load_reward(RewardConfig("gloom"))


def test_weights_that_cannot_be_read_are_told():
    with pytest.raises(UserError, match="cannot load its weights: KeyError"):
        load_rewards([RewardConfig("tests.bad_rewards.Weightless")])


def raising(inputs):
    raise KeyError("weights")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raising, "reward 'bad' raised KeyError"),
        (lambda inputs: [1.0], "answered 1 scores for 2 samples"),
        (lambda inputs: [1.0, float("inf")], "answered inf for sample 1"),
        (lambda inputs: [1.0, None], "no float"),
    ],
)
def test_a_bad_answer_is_refused_by_name(reward, message):
    with pytest.raises(UserError, match=message):
        score(reward, "bad", [given(CLEAN)] * 2, [2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig("nonsense"), "allowed are aesthetic, alignment, brisque"),
        (RewardConfig("no.such.Thing"), "cannot be imported"),
        (RewardConfig("ocr", args={"langage": "en"}), "cannot be built"),
        (
            RewardConfig("alignment", args={"model": "local-dir:gone", "pretrained": None}),
            "cannot be loaded",
        ),
        (
            RewardConfig("aesthetic", args={"model": CLIP, "pretrained": None, "head": "x"}),
            "no such file",
        ),
    ],
)
def test_a_reward_that_cannot_be_built_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        load_rewards([config])


def test_the_working_directory_is_looked_in_last(tmp_path, monkeypatch):
    (tmp_path / "my_own_reward.py").write_text(
        "class R:\n    def __call__(self, i):\n        return []\n"
    )
    monkeypatch.chdir(tmp_path)
    before = [p for p in sys.path if p not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", list(before))
    load_reward(RewardConfig("my_own_reward.R"))
    assert sys.path == [*before, str(tmp_path)]
