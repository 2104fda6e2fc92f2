"""The judge reward against a real HTTP server that answers as an OpenAI-compatible one does."""

import logging
import math
import threading
import time

import numpy as np
import pytest
from PIL import Image

from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.rewards.base import RewardInput
from duet.rewards.registry import load_reward, load_rewards
from tests.bad_server import HEAD, bad_server, drip, endless, nobody
from tests.judge_endpoint import completion, shown

PICTURE = Image.fromarray(np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3))
QUESTION = "Does the picture show {prompt} with {row[text]}?"


def judge(endpoint, **args):
    return load_reward(
        RewardConfig("judge", args={"url": endpoint.url, "model": "m", "question": QUESTION} | args)
    )


def sample(**row):
    return RewardInput(PICTURE, "a card", {"text": "CAT"} | row)


def test_the_request_carries_the_question_and_the_picture(endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    endpoint.replies = [completion("yes")]
    assert judge(endpoint, api_key_env="JUDGE_KEY")([sample()]) == [1]
    [(path, headers, body)] = endpoint.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "m" and body["logprobs"] and body["temperature"] == 0
    image, text = body["messages"][0]["content"]
    assert text["text"].startswith("Does the picture show a card with CAT?")
    assert (np.asarray(shown(image)) == np.asarray(PICTURE)).all()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (completion("Yes", {"Yes": 0.6, " yes": 0.1, "No": 0.2, "The": 0.1}), 0.7 / 0.9),
        (completion("No", {"no": 0.75, "yes": 0.25}), 0.25),  # the probability, not the word
        (completion("Yes."), 1),
        (completion("no, it shows a dog"), 0),
        (completion("Yes", {"The": 0.9}), 1),  # no log-prob of either word: by the text
        (completion("yes and no"), math.nan),
        (completion("Nothing here"), math.nan),
        (completion(None), math.nan),
        ({"error": "busy"}, math.nan),
        ([], math.nan),
        ("<html>", math.nan),
    ],
)
def test_yes_or_no(endpoint, answer, expected):
    endpoint.replies = [answer]
    assert judge(endpoint)([sample()]) == pytest.approx([expected], nan_ok=True)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (completion("7", {"7": 0.5, "8": 0.25, "5": 0.25, "x": 0.3}), (6.75 - 1) / 9),
        (completion("10", {"10": 0.5, "1": 0.5}), (5.5 - 1) / 9),
        (completion("10", {"1": 0.8, "9": 0.2}, {"0": 0.75, "": 0.25}), (7.8 + 0.2 - 1) / 9),
        (completion("1", {"1": 1.0}), 0),
        (completion("9", {"9": 0.6, "1": 0.4}), 8 / 9),  # 1 or 10: not to be told
        (completion("8/10"), 7 / 9),
        (completion("I give it 7.5 out of 10."), 6.5 / 9),
        (completion("10"), 1),
        (completion("11"), math.nan),
        (completion("0"), math.nan),
        (completion("between 3 and 5"), math.nan),
        (completion("good"), math.nan),
    ],
)
def test_a_mark_of_ten(endpoint, answer, expected):
    endpoint.replies = [answer]
    score = judge(endpoint, reading="scale")([sample()])
    assert score == pytest.approx([expected], nan_ok=True)


def test_many_samples_keep_their_order(endpoint):
    def answer(body):
        asked = int(body["messages"][0]["content"][1]["text"].split("\n")[0])
        return completion("yes", {"yes": asked / 50, "no": 1 - asked / 50})

    endpoint.replies = [answer]
    scores = judge(endpoint, question="{row[n]}", concurrency=4)(
        [sample(n=i) for i in range(1, 30)]
    )
    assert scores == pytest.approx([i / 50 for i in range(1, 30)])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(endpoint, status):
    endpoint.replies = [(status, "busy"), (status, "busy"), completion("yes")]
    assert judge(endpoint, retries=2)([sample()]) == [1]
    assert len(endpoint.requests) == 3


def test_what_will_not_pass_is_nan_with_one_warning(endpoint, caplog):
    endpoint.replies = [(401, "wrong key")]
    with caplog.at_level(logging.WARNING):
        scores = judge(endpoint)([sample()] * 3)
    assert all(math.isnan(s) for s in scores) and len(endpoint.requests) == 3  # no retry
    [record] = caplog.records
    assert "3 of 3 samples are NaN, mostly: HTTP 401: wrong key" in record.message
    assert "secret" not in record.message


def test_one_unreadable_answer_costs_only_its_sample(endpoint, caplog):
    endpoint.replies = [completion("yes"), completion("hm"), completion("no")]
    with caplog.at_level(logging.WARNING):
        scores = judge(endpoint, concurrency=1)([sample()] * 3)
    assert scores[0] == 1 and math.isnan(scores[1]) and scores[2] == 0
    assert "1 of 3 samples are NaN, mostly: neither yes nor no: 'hm'" in caplog.text


def test_an_endpoint_that_is_not_there_is_nan(endpoint, caplog):
    with nobody() as url, caplog.at_level(logging.WARNING):
        gone = judge(endpoint, retries=1, url=f"{url}/v1")
        assert math.isnan(gone([sample()])[0])
    assert "ConnectError" in caplog.text


def test_an_endpoint_that_hangs_is_nan(endpoint, caplog, monkeypatch):
    let_go = threading.Event()
    monkeypatch.setattr(endpoint.server, "finish_request", lambda *args: let_go.wait(5))
    with caplog.at_level(logging.WARNING):
        assert math.isnan(judge(endpoint, retries=0, timeout_seconds=0.2)([sample()])[0])
    let_go.set()
    assert "no whole answer in 0.2 s" in caplog.text


def test_a_question_does_not_apply_to_a_row_without_what_it_names(endpoint, caplog):
    endpoint.replies = [completion("yes")]
    reward = judge(endpoint)
    with caplog.at_level(logging.WARNING):
        assert reward([RewardInput(PICTURE, "a card", {}), sample()]) == [None, 1]
        assert reward([RewardInput(PICTURE, "a card", {})]) == [None]
    [told] = caplog.messages
    assert "does not apply to rows without 'text', which the question names" in told


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (drip(HEAD + b"\r\n" + b" " * 99), "no whole answer in 0.3 s"),
        (endless(HEAD + b"\r\n", b" " * 65536), "more than 1048576 bytes"),
    ],
)
def test_an_answer_is_bounded_in_time_and_size(endpoint, caplog, answer, reason):
    with bad_server(answer) as (url, _), caplog.at_level(logging.WARNING):
        slow = judge(endpoint, url=url, retries=0, timeout_seconds=0.3)
        start = time.monotonic()
        assert math.isnan(slow([sample()])[0]) and time.monotonic() - start < 2
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"question": "Is it {promt}?"}, r"names 'promt': it may name \{prompt\} and \{row\[KEY\]\}"),
        ({"question": "{row}"}, "names 'row'"),
        ({"question": "{prompt.__class__}"}, "names"),
        ({"question": "{}"}, "names ''"),
        ({"question": "{prompt:{x}}"}, "names"),
        ({"question": "100 } of it"}, "Single '}'"),
        ({"reading": "stars"}, "judge reading 'stars': allowed are yes_no, scale, reasoned"),
        ({"url": "judge.example:80"}, "judge url 'judge.example:80'"),
        ({"timeout_seconds": 0}, "judge timeout_seconds 0"),
        ({"retries": -1}, "judge retries -1"),
        ({"concurrency": 0}, "judge concurrency 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_at_construction(endpoint, args, message):
    with pytest.raises(UserError, match=message):
        judge(endpoint, **args)


def test_a_missing_key_is_told_by_load(endpoint, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    args = {"url": endpoint.url, "model": "m", "question": "?", "api_key_env": "NO_SUCH_KEY"}
    with pytest.raises(UserError, match="'NO_SUCH_KEY': no such environment variable"):
        load_rewards([RewardConfig("judge", args=args)])
