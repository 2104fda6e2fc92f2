"""A reward whose servers do not answer one process at all: its share may be one that
`train.max_not_scored` allows, and yet the run ends."""

import json

import pytest
import torch
from PIL import Image

from duet.configs.errors import UserError
from duet.rewards.base import RewardInput
from duet.rewards.judge import Judge
from duet.rewards.service.remote import Remote
from duet.train.loop import train
from duet.train.scoring import Scorer, answered
from tests.bad_server import bad_server, nobody, reply, scores

SAMPLE = [RewardInput(Image.new("RGB", (8, 8)), "a card", {})]
UNREADABLE = json.dumps({"choices": [{"message": {"content": "hm"}}]}).encode()


def remote(url: str) -> Remote:
    return Remote(url, "x", timeout_seconds=2, retries=0)


def judge(url: str) -> Judge:
    return Judge(f"{url}/v1", "m", "Is it red?", timeout_seconds=2, retries=0)


def turn_to(reward: Remote | Judge, url: str) -> None:
    if isinstance(reward, Remote):
        reward.endpoints.urls = [url]
    else:
        reward.url = url


def step(reward: Remote | Judge, weight: float = 1, allowed: float = 0.5):
    return answered(Scorer({"a": reward}, {}), torch.tensor([weight]), allowed)


@pytest.mark.parametrize("make", [remote, judge])
def test_a_step_without_one_answer_is_told_with_its_reason(make):
    told = r"^reward 'a' had no good answer in a whole step \(.*ConnectError"
    with nobody() as silent:
        reward = make(silent)
        with pytest.raises(UserError, match=told), step(reward):
            reward(SAMPLE)
        with step(reward):
            pass  # nothing was asked of it
        for given in ({"weight": 0}, {"allowed": 1}):
            with step(reward, **given):
                reward(SAMPLE)


@pytest.mark.parametrize(
    ("make", "answer"), [(remote, scores("[0.5]")), (judge, reply(UNREADABLE))]
)
def test_one_answer_is_enough_if_it_is_of_this_step(make, answer):
    """One that a judge gave and nobody can read, too."""
    with nobody() as silent, bad_server(answer) as (url, _):
        reward = make(url)
        with step(reward):
            reward(SAMPLE)
            turn_to(reward, silent)
            reward(SAMPLE)
        turn_to(reward, url if make is remote else f"{url}/v1/chat/completions")
        reward(SAMPLE)  # as an evaluation before the step does
        turn_to(reward, silent)
        with pytest.raises(UserError), step(reward):
            reward(SAMPLE)


def test_a_run_ends_by_it(small_run, tmp_path):
    reward = "rewards=[{name: tests.bad_rewards.Unanswered}]"
    told = "reward 'Unanswered' had no good answer in a whole step .*: mend it; no checkpoint"
    with pytest.raises(UserError, match=told):
        train(small_run("decoder", reward))
