"""A vision-language model as judge, behind an OpenAI-compatible /chat/completions endpoint."""

import base64
import io
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from string import Formatter
from typing import Any, Literal

import httpx
from PIL import Image

from duet.configs.errors import UserError
from duet.rewards.base import RewardInput
from duet.rewards.judge_reading import READINGS, Unscored

logger = logging.getLogger(__name__)

_FIELD = re.compile(r"prompt|row\[[^\[\]]+\]")  # what a question may name
PAUSE_SECONDS = 0.5  # before the first retry; doubled for each further one


class Judge:
    """P(yes), or the expected mark, of the judge's answer to a question, in [0, 1].

    A sample without a readable answer scores NaN; one warning a call tells why.
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
        `api_key_env`: the environment variable that holds the key.
        """
        if reading not in READINGS:
            raise UserError(f"judge reading {reading!r}: allowed are {', '.join(READINGS)}")
        if not url.startswith(("http://", "https://")):
            raise UserError(f"judge url {url!r}: give http://HOST:PORT/v1 or https://...")
        for name, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if value < least:
                raise UserError(f"judge {name} {value}: give a whole number >= {least}")
        _check_question(question)
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.question, self.reading = question, READINGS[reading]
        self.api_key_env, self.timeout_seconds = api_key_env, timeout_seconds
        self.retries, self.concurrency = retries, concurrency

    def load(self) -> None:
        _ = self._headers()

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        client = httpx.Client(headers=self._headers(), timeout=self.timeout_seconds)
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            answers = list(pool.map(partial(self._score, client), inputs))
        failures = Counter(reason for _, reason in answers if reason)
        if failures:
            reason, _ = failures.most_common(1)[0]
            told = f"{failures.total()} of {len(inputs)} samples are NaN, mostly: {reason}"
            logger.warning("judge at %s: %s", self.url, told)
        return [score for score, _ in answers]

    def _score(self, client: httpx.Client, item: RewardInput) -> tuple[float, str]:
        """The score, or NaN and the reason."""
        try:
            return self.reading.read(self._post(client, self._request(item))), ""
        except Unscored as error:
            return float("nan"), str(error)

    def _post(self, client: httpx.Client, request: Mapping[str, Any]) -> Any:
        """The endpoint's JSON; what may pass (no connection, 429, 5xx) is tried again."""
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                response = client.post(self.url, json=request)
            except httpx.RequestError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return _json(response)
            reason = f"HTTP {response.status_code}: {response.text[:200]}"
            if response.status_code < 500 and response.status_code != 429:
                break
        raise Unscored(reason)

    def _request(self, item: RewardInput) -> dict[str, Any]:
        try:
            question = self.question.format(prompt=item.prompt, row=item.row)
        except KeyError as error:
            raise Unscored(f"the row has no {error} that the question names") from error
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
                        {"type": "image_url", "image_url": {"url": data_url(item.image)}},
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


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise Unscored(f"the endpoint's answer is not JSON: {response.text[:80]!r}") from error


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
