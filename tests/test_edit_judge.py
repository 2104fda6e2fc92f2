"""The judge of edits: which pictures it is sent, what it is told of them, shipped questions, draws."""

import json
import logging
import math

import numpy as np
import pytest
from PIL import Image

from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.rewards.base import RewardInput
from duet.rewards.judge_questions import SHIPPED
from duet.rewards.registry import load_reward
from tests.judge_endpoint import completion, shown

RESULT = Image.new("RGB", (96, 64), (200, 0, 0))
EDIT = "make the {background} blue"


@pytest.fixture
def files(tmp_path):
    """Paths of pictures that differ in size and colour."""
    made = {}
    for n, (name, size) in enumerate(
        {"a": (96, 64), "b": (40, 150), "large": (2000, 1000), "wanted": (192, 128)}.items()
    ):
        made[name] = str(tmp_path / f"{name}.png")
        Image.new("RGB", size, (0, 50 * n, 200)).save(made[name])
    return made


def judge(endpoint, view="full", **args):
    asked = {"url": endpoint.url, "model": "m", "question": "Is it right?"} | args
    return load_reward(RewardConfig("judge", args=asked, view=view))


def sample(**row):
    return RewardInput(RESULT, EDIT, row)


def sent(endpoint):
    """Pictures and text of the last request."""
    *pictures, text = endpoint.requests[-1][2]["messages"][0]["content"]
    return [shown(part) for part in pictures], text["text"]


def test_sources_are_sent_in_their_order_and_told(endpoint, files):
    endpoint.replies = [completion("yes")]
    reward = judge(endpoint, pictures=["sources", "image"])
    assert reward([sample(sources=[files["a"], files["b"]])]) == [1]
    pictures, text = sent(endpoint)
    assert [p.size for p in pictures] == [(96, 64), (26, 96), (96, 64)], "whole, no side above 96"
    assert [p.getpixel((0, 0))[1:] for p in pictures] == [(0, 200), (50, 200), (0, 0)]
    assert text.splitlines()[:3] == [
        "Pictures 1 to 2 are the sources, in their order.",
        "Picture 3 is the result, which is to be judged.",
        "Is it right?",
    ]
    reward([sample(sources=[files["b"], files["a"]])])
    assert [p.size for p in sent(endpoint)[0]] == [(26, 96), (96, 64), (96, 64)]
    reward([sample(source=files["large"])])
    pictures, text = sent(endpoint)
    assert [p.size for p in pictures] == [(96, 48), (96, 64)]
    assert text.startswith("Picture 1 is the source.\nPicture 2 is the result, which is to be ju")


def test_the_wanted_result_may_be_shown_and_the_order_is_the_configs(endpoint, files):
    endpoint.replies = [completion("yes")]
    judge(endpoint, pictures=["image", "wanted", "sources"])(
        [sample(sources=[files["a"]], image=files["wanted"])]
    )
    pictures, text = sent(endpoint)
    assert [p.size for p in pictures] == [(96, 64)] * 3
    assert [p.getpixel((0, 0))[1] for p in pictures] == [0, 150, 0]
    assert text.splitlines()[:3] == [
        "Picture 1 is the result, which is to be judged.",
        "Picture 2 is the result that was wanted.",
        "Picture 3 is the source.",
    ]


def test_without_pictures_only_the_sample_is_sent(endpoint, files):
    endpoint.replies = [completion("yes")]
    judge(endpoint)([sample(sources=[files["a"]])])
    pictures, text = sent(endpoint)
    assert len(pictures) == 1 and text.startswith("Is it right?\n")


def test_a_view_shows_the_sources_too(endpoint, files):
    endpoint.replies = [completion("yes")]
    judge(endpoint, view="low", pictures=["sources", "image"])([sample(source=files["large"])])
    assert [p.size for p in sent(endpoint)[0]] == [(12, 6), (12, 8)]


def test_a_judge_of_edits_does_not_apply_to_text(endpoint, files, caplog):
    endpoint.replies = [completion("yes")]
    both = judge(endpoint, pictures=["sources", "image", "wanted"])
    rows = [sample(), sample(source=files["a"]), sample(source=files["a"], image=files["wanted"])]
    with caplog.at_level(logging.WARNING):
        assert both(rows) == both(rows) == [None, None, 1]
    assert len(endpoint.requests) == 2 and len(caplog.messages) == 2, "each key is told once"
    assert "rows without 'sources', which `pictures` asks for" in caplog.messages[0]
    assert "rows without 'image', which `pictures` asks for" in caplog.messages[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_question_names_the_instruction_and_shows_what_it_speaks_of(
    endpoint, files, name
):
    """Its marks are 0 to 10; braces in a prompt are a prompt's."""
    endpoint.replies = [completion("7", {"7": 0.5, "8": 0.25, "0": 0.25})]
    row = {"sources": [files["a"], files["b"]]}
    scores = judge(endpoint, question=name)([RewardInput(RESULT, EDIT, row)])
    assert scores == pytest.approx([0.55])
    pictures, text = sent(endpoint)
    on_edits = name != "perceptual_quality"
    assert len(pictures) == (3 if on_edits else 1) and (EDIT in text) == on_edits
    assert text.endswith("Answer with one whole number from 0 (worst) to 10 (best).")
    assert "10: " in text and "0: " in text
    if not on_edits:
        assert judge(endpoint, question=name)([sample()]) == scores, "text has a quality, too"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (completion("0", {"0": 0.75, "2": 0.25}), 0.05),
        (completion("10", {"1": 0.8, "9": 0.2}, {"0": 0.75, "": 0.25}), 0.8 * 0.775 + 0.18),
        (completion("1", {"1": 1.0}), 0.1),
        (completion("9", {"9": 0.6, "1": 0.4}), 0.9),  # 1 or 10: not to be told
        (completion("0"), 0),
        (completion("8/10"), 0.8),
        (completion("11"), math.nan),
        (completion("-"), math.nan),
    ],
)
def test_marks_from_0_to_10(endpoint, answer, expected):
    endpoint.replies = [answer]
    scores = judge(endpoint, reading="scale", scale=[0, 10])([sample()])
    assert scores == pytest.approx([expected], nan_ok=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reasoning": "blue, but {smeared}", "score": [20, 5]}', 0.2),  # the least of them
        ('Well: ```json\n{"reasoning": "x", "score": 25}\n```', 1),
        ('{"reasoning": "x", "score": [12.5]}', 0.5),
        ('{"reasoning": "x", "score": [26]}', math.nan),
        ('{"reasoning": "x", "score": [-1, 3]}', math.nan),
        ('{"reasoning": "x", "score": []}', math.nan),
        ('{"reasoning": "x", "score": ["20"]}', math.nan),
        ('{"reasoning": "x", "score": [true]}', math.nan),
        ('{"reasoning": "x", "score": [NaN]}', math.nan),
        ('{"reasoning": "20"}', math.nan),
        ('{"reasoning": "cut off at the longest ans', math.nan),
        ("20", math.nan),
        ("[" * 5000, math.nan),
        (None, math.nan),
    ],
)
def test_reasons_and_then_marks(endpoint, text, expected):
    endpoint.replies = [completion(text)]
    scores = judge(endpoint, reading="reasoned", scale=[0, 25])([sample()])
    assert scores == pytest.approx([expected], nan_ok=True)
    body = endpoint.requests[-1][2]
    assert body["max_tokens"] == 512 and "logprobs" not in body
    assert "from 0 (worst) to 25 (best)" in sent(endpoint)[1]


def drawn(*texts):
    return {"choices": [completion(text)["choices"][0] for text in texts]}


def test_several_draws_are_averaged_and_one_is_the_likeliest(endpoint, caplog):
    mark = '{{"reasoning": "x", "score": [{}]}}'.format
    endpoint.replies = [drawn(mark(10), mark(0), "hm", mark(5)), drawn("hm", "hm", "hm", "hm")]
    four = judge(endpoint, reading="reasoned", draws=4)
    assert four([sample()]) == [0.5], "of those that can be read"
    body = endpoint.requests[0][2]
    assert (body["n"], body["temperature"]) == (4, 0.7)
    with caplog.at_level(logging.WARNING):
        assert math.isnan(four([sample()])[0])
        endpoint.replies = [drawn(mark(10))]
        assert math.isnan(four([sample()])[0])
    assert "no marks from 0 to 10: it ends 'hm'" in caplog.messages[0]
    assert "1 of 4 draws: the endpoint takes no `n` so large" in caplog.messages[1]
    endpoint.replies = [completion(mark(7))]
    assert judge(endpoint, reading="reasoned")([sample()]) == [0.7]
    assert "n" not in endpoint.requests[-1][2] and endpoint.requests[-1][2]["temperature"] == 0


def test_a_shipped_question_may_be_read_otherwise(endpoint, files):
    endpoint.replies = [completion(json.dumps({"reasoning": "x", "score": [20]}))]
    args = {"question": "over_editing", "reading": "reasoned", "scale": [0, 25]}
    assert judge(endpoint, **args)([sample(source=files["a"])]) == [0.8]
    endpoint.replies = [completion("no", {"no": 0.75, "yes": 0.25})]
    args = {"question": "over_editing", "reading": "yes_no", "pictures": ["image"]}
    assert judge(endpoint, **args)([sample()]) == [0.25]


def test_a_source_that_has_gone_ends_the_run_in_one_line(endpoint, files):
    with pytest.raises(UserError, match="'/gone.png' cannot be read: No such file"):
        judge(endpoint, question="over_editing")([sample(source="/gone.png")])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"question": "overediting"}, "question 'overediting' is no shipped one: there are instr"),
        ({"pictures": []}, r"judge pictures \[\]: give a list of sources, image, wanted"),
        ({"pictures": ["sources"]}, "with image in it"),
        ({"pictures": ["image", "image"]}, "each once"),
        ({"pictures": ["image", "source"]}, r"pictures \['image', 'source'\]: give"),
        ({"pictures": "image"}, "pictures 'image': give a list"),
        ({"pictures": ["image", ["sources"]]}, "give a list"),
        ({"pictures": {"image": 1}}, "give a list"),
        ({"scale": [0, 10]}, "reading yes_no has no marks"),
        ({"reading": "scale", "scale": [0, 25]}, "marks above 10 need reading 'reasoned'"),
        ({"reading": "scale", "scale": [5, 5]}, r"judge scale \[5, 5\]: give the worst and the b"),
        ({"reading": "scale", "scale": [0, 5, 10]}, "two whole numbers"),
        ({"reading": "scale", "scale": [0.5, 3]}, "two whole numbers"),
        ({"reading": "scale", "scale": 10}, "two whole numbers"),
        ({"reading": "scale", "scale": []}, "two whole numbers"),
        ({"question": "over_editing", "scale": []}, "two whole numbers"),
        ({"reading": "reasoned", "scale": [-1, 3]}, "of 0 to 100"),
        ({"reading": "reasoned", "scale": [0, True]}, "two whole numbers"),
        ({"draws": 0}, "judge draws 0: give a whole number >= 1"),
        ({"draws": 1.5}, "judge draws 1.5"),
        ({"draws": "4"}, "judge draws '4'"),
    ],
)
def test_a_mistake_is_refused_at_construction(endpoint, args, message):
    with pytest.raises(UserError, match=message):
        judge(endpoint, **args)


def test_pictures_are_what_was_stored(endpoint, files):
    """Turned as a viewer shows them; the row's own is left as it is."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3))
    lying.save(files["a"], exif=exif)
    endpoint.replies = [completion("yes")]
    judge(endpoint, pictures=["sources", "image"])([sample(sources=[files["a"], lying])])
    assert [p.size for p in sent(endpoint)[0]] == [(64, 96), (96, 64), (96, 64)]
    assert lying.size == (96, 64)
