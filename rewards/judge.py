"""A vision-language model as judge, behind an OpenAI-compatible /chat/completions endpoint."""

import asyncio
import base64
import io
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from string import Formatter
from typing import Any, Literal

from PIL import Image

from duet.configs.errors import UserError
from duet.rewards.answers import Answer
from duet.rewards.base import RewardInput
from duet.rewards.judge_reading import READINGS, Unscored
from duet.rewards.service.heard import Heard
from duet.rewards.service.http import Client, Failure, converse, excerpt, is_address

logger = logging.getLogger(__name__)

_FIELD = re.compile(r"prompt|row\[[^\[\]]+\]")  # what a question may name
PAUSE_SECONDS = 0.5  # before the first retry; doubled for each further one


class Judge:
    """P(yes), or the expected mark, of the judge's answer to a question, in [0, 1].

    A sample without a readable answer scores NaN; one warning a call tells why. The reward does
    not apply to a row without a key that the question names.
    """

    def __init__(
        self,
        url: str,
        model: str,
        question: str,
        reading: Literal["yes_no", "scale"] = "yes_no",
        api_key_env: str | None = None,
        timeout_seconds: float = 60.0,
        retries: int = 2,
        concurrency: int = 8,
    ) -> None:
        """`url`: up to and with /v1. `question` may name {prompt} and {row[KEY]}.

        `reading`: yes_no, or scale for marks from 1 to 10, mapped to 0 to 1.
        `timeout_seconds` bounds each request, connecting and the whole answer included.
        `api_key_env`: the environment variable that holds the key.
        """
        if reading not in READINGS:
            raise UserError(f"judge reading {reading!r}: allowed are {', '.join(READINGS)}")
        if not is_address(url):
            raise UserError(f"judge url {url!r}: give http://HOST:PORT/v1 or https://...")
        if not 0 < timeout_seconds < math.inf:
            raise UserError(f"judge timeout_seconds {timeout_seconds}: give a number > 0")
        for name, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if value < least:
                raise UserError(f"judge {name} {value}: give a whole number >= {least}")
        _check_question(question)
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.question, self.reading = question, READINGS[reading]
        self.api_key_env, self.timeout_seconds = api_key_env, timeout_seconds
        self.retries, self.concurrency = retries, concurrency
        self.missing: set[str] = set()  # keys that some row lacked
        self.heard = Heard()

    def load(self) -> None:
        _ = self._headers()

    def __call__(self, inputs: Sequence[RewardInput]) -> list[Answer]:
        answers = converse(self.timeout_seconds, partial(self._score_all, inputs))
        failures = Counter(reason for _, reason in answers if reason)
        if failures:
            reason, _ = failures.most_common(1)[0]
            told = f"{failures.total()} of {len(inputs)} samples are NaN, mostly: {reason}"
            logger.warning("judge at %s: %s", self.url, told)
        return [score for score, _ in answers]

    def silence(self) -> str | None:
        """As `Heard` has it."""
        return self.heard.silence()

    async def _score_all(
        self, inputs: Sequence[RewardInput], client: Client
    ) -> list[tuple[Answer, str]]:
        turns = asyncio.Semaphore(self.concurrency)

        async def score(item: RewardInput) -> tuple[Answer, str]:
            async with turns:
                return await self._score(client, item)

        return await asyncio.gather(*map(score, inputs))

    async def _score(self, client: Client, item: RewardInput) -> tuple[Answer, str]:
        """The score; or NaN and the reason; or None for a row that the question is not for."""
        try:
            question = self.question.format(prompt=item.prompt, row=item.row)
        except KeyError as error:
            self._tell_missing(error.args[0])
            return None, ""
        body = json.dumps(self._request(question, item.image)).encode()
        try:
            reply = await self._post(client, body)
        except (Unscored, Failure) as error:
            self.heard.failure = str(error)
            return float("nan"), str(error)
        self.heard.answers += 1
        try:
            return self.reading.read(reply), ""
        except Unscored as error:
            return float("nan"), str(error)

    def _tell_missing(self, key: str) -> None:
        """Once: it may be a mistake of spelling."""
        if key not in self.missing:
            self.missing.add(key)
            told = "judge at %s does not apply to rows without %r, which the question names"
            logger.warning(told, self.url, key)

    async def _post(self, client: Client, body: bytes) -> Any:
        """The endpoint's JSON; what may pass (no connection, 429, 5xx) is tried again."""
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                reply = await client.request(self.url, body, self._headers())
            except Failure as failure:
                if not failure.again:
                    raise
                reason = str(failure)
                continue
            if 200 <= reply.status < 300:
                return _json(reply.body)
            reason = f"HTTP {reply.status}: {reply.body[:200].decode(errors='replace')}"
            if reply.status < 500 and reply.status != 429:
                break
        raise Unscored(reason)

    def _request(self, question: str, image: Image.Image) -> dict[str, Any]:
        return {
            "model": self.model,
            "temperature": 0,
            "max_tokens": 8,
            "logprobs": True,
            "top_logprobs": 20,  # the most that OpenAI and vLLM allow
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": data_url(image)}},
                        {"type": "text", "text": f"{question}\n{self.reading.instruction}"},
                    ],
                }
            ],
        }

    def _headers(self) -> dict[str, str]:
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env)
        if not key:
            raise UserError(f"judge api_key_env {self.api_key_env!r}: no such environment variable")
        return {"Authorization": f"Bearer {key}"}


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unscored(f"the endpoint's answer is not JSON: it begins {excerpt(body)}") from error


def data_url(image: Image.Image) -> str:
    """The picture as a PNG inside a URL."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _check_question(question: str) -> None:
    advice = "it may name {prompt} and {row[KEY]}; write {{ and }} for braces"
    try:
        fields = [f for f in Formatter().parse(question) if f[1] is not None]
    except ValueError as error:
        raise UserError(f"judge question {question!r}: {error}: {advice}") from error
    for _, name, spec, conversion in fields:
        if spec or conversion or not _FIELD.fullmatch(name):
            raise UserError(f"judge question {question!r} names {name!r}: {advice}")
