"""The `remote` reward and servers that go wrong: a run goes on, with NaN and one warning."""

import logging
import math
import time

import numpy as np
import pytest
from PIL import Image

from duet.configs.errors import UserError
from duet.rewards.base import RewardInput
from duet.rewards.service.remote import Remote
from tests.bad_server import BAD, GOOD, bad_server, nobody, reply

QUICK = {"timeout_seconds": 0.5, "retries": 1, "backoff_seconds": 0.05}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("url", []), ("url", "reward.example:80"), ("url", "ftp://a"), ("url", "http://"), ("url", [1]),
        ("url", "http://a:b"), ("url", "http://a:70000"), ("url", "http://a?b=1"), ("url", ["http://a", "http://a/"]), ("reward", ""), ("batch_size", 0),
        ("batch_size", True), ("timeout_seconds", 0), ("timeout_seconds", math.inf),
        ("timeout_seconds", math.nan), ("retries", -1), ("retries", 1000), ("backoff_seconds", -1),
        ("backoff_seconds", "1"), ("image_format", "jpeg"), ("token_env", 1), ("whole_groups", "no"),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(key, value):
    with pytest.raises(UserError, match=f"remote reward: {key} = "):
        Remote(**({"url": "http://a", "reward": "b"} | {key: value}))


@pytest.mark.parametrize("value", [{1}, math.nan, math.inf, b"a", {1: "a"}, (1, 2), object()])
def test_a_row_that_json_cannot_carry_is_refused(value):
    item = RewardInput(Image.new("RGB", (8, 8)), "a", {"prompt": "a", "boxes": [value]})
    with pytest.raises(UserError, match="row key 'boxes' holds a list that JSON cannot carry"):
        Remote("http://a", "x")([item])


def ask(url, count=2, **changes):
    """Scores of a remote reward that is in a hurry, and the seconds that they took."""
    pictures = [RewardInput(Image.new("RGB", (8, 8)), "a", {"prompt": "a"})] * count
    reward = Remote(url, "x", **(QUICK | changes))
    start = time.monotonic()
    return reward(pictures), time.monotonic() - start


def check_survived(url, scores, seconds, caplog, reason):
    assert len(scores) == 2 and np.isnan(scores).all()
    assert seconds < 3  # two time-outs and a pause are 1.08 s at most
    [warning] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning.startswith(f"remote reward 'x': 2 of 2 samples are not scored: {url}: ")
    assert reason in warning and "\n" not in warning


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_survived(name, caplog):
    answer, reason = BAD[name]
    with bad_server(answer) as (url, _):
        scores, seconds = ask(url)
    check_survived(url, scores, seconds, caplog, reason)


def test_a_refused_connection_is_survived(caplog):
    with nobody() as url:
        scores, seconds = ask(url)
    check_survived(url, scores, seconds, caplog, "ConnectError")


def test_an_unknown_host_is_survived(caplog):
    scores, seconds = ask("http://nowhere.invalid", timeout_seconds=1)
    check_survived("http://nowhere.invalid", scores, 0, caplog, "nowhere.invalid: ")


@pytest.mark.parametrize(
    ("status", "asked"),
    [("500 x", 3), ("503 x", 3), ("429 x", 3), ("404 x", 1), ("413 x", 1), ("302 x", 1)],
)
def test_only_what_another_attempt_may_help_is_repeated(status, asked):
    with bad_server(reply(b"", status)) as (url, requests):
        ask(url, retries=2)
        assert len(requests) == asked


def test_the_second_attempt_may_succeed(caplog):
    answers = [reply(b"", "503 x"), reply(GOOD)]
    with bad_server(lambda connection: answers.pop(0)(connection)) as (url, _):
        assert ask(url)[0] == [0.5, 0.5]
    assert "0 of 2 samples" in caplog.text and "HTTP 503" in caplog.text


@pytest.mark.parametrize("name", ["404", "too few", "never answers", "redirect to itself", "500"])
def test_the_next_endpoint_is_asked_whatever_is_wrong_with_the_first(name):
    with bad_server(BAD[name][0]) as (bad, requests), bad_server(reply(GOOD)) as (good, _):
        assert ask([bad, good])[0] == [0.5, 0.5]
        assert len(requests) == 1  # before any retry


def test_a_server_that_hangs_costs_a_call_its_time_outs_once():
    with bad_server(BAD["never answers"][0]) as (url, _):
        scores, seconds = ask(url, count=40, batch_size=1)
    assert len(scores) == 40 and np.isnan(scores).all() and seconds < 3


def test_one_bad_request_does_not_take_the_others_with_it():
    answers = [reply(b"", "500 x"), reply(b"", "500 x"), reply(GOOD), reply(GOOD)]
    with bad_server(lambda connection: answers.pop(0)(connection)) as (url, _):
        scores, _ = ask(url, count=6, batch_size=2)
    assert np.isnan(scores[:2]).all() and scores[2:] == [0.5] * 4


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_refused_token_ends_the_run(status):
    with bad_server(reply(b"", status)) as (url, _), pytest.raises(UserError, match="token"):
        ask(url)
