"""Rewards: real OCR and towers, honest failures, nothing to be gained by cheating."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.rewards.base import RewardInput, score
from duet.rewards.fidelity import Fidelity, quality
from duet.rewards.ocr import Ocr, text_score
from duet.rewards.registry import load_reward, load_rewards
from duet.rewards.view import Viewed
from duet.train.tiny.specimens import CARD, blurred, noisy
from duet.train.tiny.world import Card, Shape, draw
from tests.conftest import CLIP, ROOT
from tests.pictures import CLEAN, DAMAGE, damaged

NAN = float("nan")
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


@pytest.mark.parametrize(
    ("prompt", "row", "expected"),
    [
        ("the baker's window and the chef's sign that says \"CHAP\"", {}, 1),
        ("a “CHAP”", {}, 1),
        ('"CHAP" on a sign, the word "Chap" in red', {}, 1),  # drawn once
        ('"CHAP" and "CHAP" and "CHAP"', {"text": "CHAP"}, 1),
        ('a "CHAP"', {"text": ["CHAP", "CHAP"]}, 0.5),  # the row is taken at its word
        ('a "WOLF"', {"text": None}, 0),
        ("a plain card", {}, None),
        ('"CHAP"', {"text": ""}, None),
        ('"CHAP"', {"text": []}, None),
        ('"CHAP"', {"text": [" "]}, None),
    ],
)
def test_ocr_asks_for_what_the_row_or_the_prompt_wants(ocr, prompt, row, expected):
    assert ocr([given(CLEAN, prompt, **row)]) == [expected]


def test_a_text_that_is_quoted_twice_may_be_drawn_twice(ocr):
    twice = Image.new("RGB", (96, 128))
    for place in (0, 64):
        twice.paste(CLEAN, (0, place))
    once, both = 'a sign "CHAP"', '"CHAP" above, "CHAP" below'
    assert ocr([given(twice, once), given(twice, both)]) == [0, 1]


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


def quitting(inputs):
    sys.exit(3)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([True, 2], [1.0, 2.0]),
        (np.array([1, 2]), [1.0, 2.0]),
        (torch.tensor([0.5, 2.0], dtype=torch.bfloat16), [0.5, 2.0]),
        ([np.float32(0.5), torch.tensor(2)], [0.5, 2.0]),
        ([0.3, 0.1 + 0.2], [0.3, 0.1 + 0.2]),  # apart by rounding only
        ([None, 1e18], [None, 1e18]),
        ((s for s in (1, 2)), [1.0, 2.0]),
    ],
)
def test_what_is_as_good_as_a_list_of_floats_is_taken(answer, expected):
    assert score(lambda inputs: answer, "good", [given(CLEAN)] * 2, [2]) == expected


def spoil(inputs):
    """Changes all that it is given; answers for what it found."""
    found = [np.mean(i.image) + len(i.row["boxes"]) + len(i.row["colours"]) for i in inputs[:1]] * 2
    for item in inputs:
        item.image.thumbnail((4, 4))
        item.image.putpixel((0, 0), (0, 255, 0))
        ImageDraw.Draw(item.image).rectangle((0, 0, 3, 3), "black")
        item.row["prompt"] = "spoiled"
        item.row["boxes"].append(1)
        item.row["colours"].clear()
    inputs.clear()
    return found


@pytest.mark.parametrize("view", ["full", "low", "high"])
def test_what_a_reward_does_to_its_inputs_no_other_sees(view):
    row = {"boxes": [1, 2], "colours": {"a": "red"}}
    inputs = [RewardInput(CLEAN.copy(), "a", row)] * 2
    reward = spoil if view == "full" else Viewed(spoil, view)
    first, again = (score(reward, "spoil", inputs, [2]) for _ in range(2))
    assert first == again and len(inputs) == 2
    assert row == {"boxes": [1, 2], "colours": {"a": "red"}}
    assert inputs[0].image.tobytes() == CLEAN.tobytes()


def test_a_view_averages_the_looks_that_a_reward_applies_to():
    answers = iter([[None, 1.0, None], [None, None, 1.0], [None, 3.0, NAN], [None, None, 2.0]])
    viewed = Viewed(lambda inputs: next(answers), "high")
    none, mean, failed = score(viewed, "viewed", [given(CLEAN)] * 3, [3])
    assert none is None and mean == 2.0 and np.isnan(failed)


PLUG_INS = {
    "a syntax error": ("def f(:\n", "SyntaxError: .*plug_in.py, line 1"),
    "an exception": ("1 / 0\n", "ZeroDivisionError: division by zero"),
    "sys.exit": ("import sys\nsys.exit('no')\n", "SystemExit: no"),
    "a missing module": ("import no_such_thing\n", "its import of 'no_such_thing' fails"),
    "no such class": ("x = 1\n", "AttributeError: .* 'R'"),
    "nothing to call": ("def R(): return 3\n", "makes a int: nothing to call"),
    "exits when built": ("def R(): raise SystemExit(4)\n", "cannot be built .*SystemExit: 4"),
}


@pytest.mark.parametrize("kind", PLUG_INS)
def test_all_errors_of_a_plug_in_are_one_line(kind, tmp_path, monkeypatch):
    code, message = PLUG_INS[kind]
    (tmp_path / "plug_in.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plug_in", raising=False)
    with pytest.raises(UserError, match=f"reward 'plug_in.R' .*{message}"):
        load_reward(RewardConfig("plug_in.R"))


def test_an_interrupt_is_no_error_of_a_plug_in(tmp_path, monkeypatch):
    (tmp_path / "stopped.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        load_reward(RewardConfig("stopped.R"))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raising, "reward 'bad' raised KeyError"),
        (quitting, "reward 'bad' raised SystemExit: 3"),
        (lambda inputs: [1.0], "answered 1 scores for 2 samples"),
        (lambda inputs: None, "answered a NoneType None: return a list"),
        (lambda inputs: 0.5, "answered 0.5: return a list"),
        (lambda inputs: {0: 1.0, 1: 2.0}, "answered a dict"),
        (lambda inputs: "12", "answered a str"),
        (lambda inputs: ["1", "2"], "answered a str '1' for sample 0, which is no float"),
        (lambda inputs: [{}, 1.0], "answered a dict {} for sample 0"),
        (lambda inputs: [1 + 0j, 1.0], "answered a complex .* for sample 0"),
        (lambda inputs: np.ones((2, 1)), "answered a ndarray of shape .1,. for sample 0"),
        (lambda inputs: torch.ones(2, 3), "answered a Tensor of shape .3,. for sample 0"),
        (lambda inputs: np.array(["a", "b"]), "no float"),
        (lambda inputs: [1.0, float("inf")], "answered inf for sample 1"),
        (lambda inputs: [1e39, 1.0], "answered 1e\\+39 for sample 0"),
        (lambda inputs: [10**400, 1.0], "answered 10+ for sample 0"),
        (
            lambda inputs: [16777216, 16777217],
            "16777216.0 to 16777217.0 for one prompt, which float32",
        ),
        (lambda inputs: [1.7e9 + n / 10 for n in range(2)], "float32 does not hold apart"),
    ],
)
def test_a_bad_answer_is_refused_by_name(reward, message):
    with pytest.raises(UserError, match=message):
        score(reward, "bad", [given(CLEAN)] * 2, [2])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig("nonsense"), "allowed are aesthetic, alignment, brisque"),
        (RewardConfig("no.such.Thing"), "there is no module 'no'"),
        (RewardConfig("..Thing"), "cannot be imported"),
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
