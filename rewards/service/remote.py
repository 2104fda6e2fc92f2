"""A reward that another process computes: `duet rewards serve`, in its own environment.

Where a server is down, slow or mad, samples are NaN, and one warning tells which endpoint failed
and why; a run ends where a whole step of one of its processes has no answer. What the user got
wrong (url, name, token) is a UserError.
"""

import logging
import math
from collections.abc import Sequence
from functools import partial
from urllib.parse import quote

from duet.configs.errors import UserError
from duet.rewards.answers import Answer
from duet.rewards.base import RewardInput
from duet.rewards.service.endpoints import Conversation, Endpoints, ask_all
from duet.rewards.service.heard import Heard
from duet.rewards.service.http import is_address
from duet.rewards.service.pictures import SAVE, WireError
from duet.rewards.service.wire import (
    TOKEN_ENV,
    Health,
    decode_health,
    decode_scores,
    encode_request,
)

_log = logging.getLogger(__name__)


class Remote:
    """A reward that a server computes: its `url` (or several, for fail-over) and name."""

    def __init__(
        self,
        url: str | list[str],
        reward: str,
        batch_size: int = 8,
        timeout_seconds: float = 60.0,
        retries: int = 2,
        backoff_seconds: float = 1.0,
        token_env: str = TOKEN_ENV,
        image_format: str = "png",
        whole_groups: bool = False,
    ) -> None:
        """`reward`: its name on the server; `batch_size`: samples a request.

        `timeout_seconds` bounds a request, the wait for other clients' requests included.
        `whole_groups`: a request holds all samples of a prompt, to compare them.
        """
        urls = _addresses(url)
        _require(isinstance(reward, str) and reward != "", "reward", reward, "a name")
        _require(_is(int, batch_size) and batch_size >= 1, "batch_size", batch_size, ">= 1")
        _require(_is(int, retries) and 0 <= retries <= 10, "retries", retries, "0 to 10")
        times = {"timeout_seconds": timeout_seconds, "backoff_seconds": backoff_seconds}
        for name, value in times.items():
            _require(_is(int | float, value) and 0 < value < math.inf, name, value, "> 0")
        _require(image_format in SAVE, "image_format", image_format, " or ".join(SAVE))
        _require(isinstance(token_env, str), "token_env", token_env, "a variable's name")
        _require(isinstance(whole_groups, bool), "whole_groups", whole_groups, "true or false")
        self.reward, self.batch_size, self.image_format = reward, batch_size, image_format
        self.whole_groups, self.heard = whole_groups, Heard()
        self.endpoints = Endpoints(urls, timeout_seconds, retries, backoff_seconds, token_env)

    def load(self) -> None:
        """Raises UserError unless a server answers that it is ready and offers this reward."""
        ask_all(self.endpoints, self._check)

    async def _check(self, conversation: Conversation) -> None:
        health = await conversation.ask("/health", self._read_health)
        told = _reasons(conversation)
        if health is None:
            raise UserError(f"remote reward {self.reward!r} has no server: {told}")
        if not health.authorised:
            raise UserError(
                f"remote reward {self.reward!r}: {conversation.endpoints.urls[0]} wants another "
                f"token than environment variable {self.endpoints.token_env} holds"
            )
        if health.whole_groups[self.reward] != self.whole_groups:
            raise UserError(
                f"remote reward {self.reward!r}: whole_groups = {self.whole_groups} is not what "
                f"the server says: set it to {not self.whole_groups}"
            )
        if told:
            _log.warning("remote reward %r: %s", self.reward, told)

    def _read_health(self, body: bytes) -> Health:
        health = decode_health(body)
        if self.reward not in health.whole_groups:
            names = ", ".join(health.whole_groups)
            raise WireError(f"does not serve {self.reward!r}: served are {names}")
        return health

    def __call__(self, inputs: Sequence[RewardInput]) -> list[Answer]:
        return ask_all(self.endpoints, partial(self._score, inputs=inputs))

    def silence(self) -> str | None:
        """As `Heard` has it."""
        return self.heard.silence()

    async def _score(
        self, conversation: Conversation, inputs: Sequence[RewardInput]
    ) -> list[Answer]:
        path = f"/score/{quote(self.reward, safe='')}"
        size = max(1, len(inputs)) if self.whole_groups else self.batch_size
        scores, lost = [], 0
        for start in range(0, len(inputs), size):
            batch = inputs[start : start + size]
            body = encode_request(batch, self.image_format)
            answer = await conversation.ask(path, partial(decode_scores, count=len(batch)), body)
            if answer is None:
                answer = [math.nan] * len(batch)
                lost += len(batch)
                self.heard.failure = _reasons(conversation)
            else:
                self.heard.answers += 1
            scores += answer
        if conversation.failures:
            _log.warning(
                "remote reward %r: %d of %d samples are not scored: %s",
                self.reward,
                lost,
                len(inputs),
                _reasons(conversation),
            )
        return scores


def _reasons(conversation: Conversation) -> str:
    return "; ".join(f"{url}: {failure}" for url, failure in conversation.failures.items())


def _addresses(url: object) -> list[str]:
    given = [url] if isinstance(url, str) else url
    _require(isinstance(given, list) and given != [], "url", url, "an address, or a list of them")
    for address in given:
        _require(is_address(address), "url", address, "an address like http://127.0.0.1:8000")
    urls = [address.rstrip("/") for address in given]
    _require(len(set(urls)) == len(urls), "url", url, "every address once")
    return urls


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"remote reward: {name} = {value!r}: allowed is {allowed}")
