"""A vision-language model as judge, behind an OpenAI-compatible /chat/completions endpoint."""

import asyncio
import base64
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from PIL import Image

from duet.configs.errors import UserError
from duet.rewards.answers import Answer
from duet.rewards.base import RewardInput
from duet.rewards.judge_questions import (
    ROW_KEYS,
    check_pictures,
    find_question,
    order_told,
    pictures_of,
)
from duet.rewards.judge_reading import Unscored, choices, find_reading
from duet.rewards.service.heard import Heard
from duet.rewards.service.http import Client, Failure, converse, excerpt, is_address

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 0.5  # before the first retry; doubled for each further one
TEMPERATURE = 0.7  # of several draws, as EditScore takes them


class Judge:
    """P(yes), or the expected mark, of the judge's answer to a question, in [0, 1].

    A sample without a readable answer scores NaN; one warning a call tells why. The reward does
    not apply to a row without a key that the question names, or without pictures that it shows.
    """

    def __init__(
        self,
        url: str,
        model: str,
        question: str,
        reading: Literal["yes_no", "scale", "reasoned"] | None = None,
        pictures: Sequence[Literal["sources", "image", "wanted"]] | None = None,
        scale: Sequence[int] | None = None,
        draws: int = 1,
        api_key_env: str | None = None,
        timeout_seconds: float = 60.0,
        retries: int = 2,
        concurrency: int = 8,
    ) -> None:
        """`url`: up to and with /v1. `question`: a name of `judge_questions.SHIPPED`, or a text
        that may name {prompt} and {row[KEY]}. `pictures`: what is sent, in order, and told so:
        the row's sources, the sample itself, the row's `image`. `reading`: yes_no, a mark of
        `scale` (worst, best), or reasons and then marks, the least of which counts. None: as the
        shipped question has it, else yes_no of [image]. The score is the mean of `draws` answers
        at a temperature of 0.7, one at 0. `timeout_seconds` bounds each request, connecting and
        the whole answer included. `api_key_env`: the environment variable that holds the key.
        """
        if not is_address(url):
            raise UserError(f"judge url {url!r}: give http://HOST:PORT/v1 or https://...")
        if not 0 < timeout_seconds < math.inf:
            raise UserError(f"judge timeout_seconds {timeout_seconds}: give a number > 0")
        least = {"retries": (retries, 0), "concurrency": (concurrency, 1), "draws": (draws, 1)}
        for name, (value, bound) in least.items():
            if type(value) is not int or value < bound:
                raise UserError(f"judge {name} {value!r}: give a whole number >= {bound}")
        asked = find_question(question)
        reading = asked.reading if reading is None else reading
        if scale is None and reading == asked.reading:
            scale = asked.scale
        self.reading = find_reading(reading, scale)
        self.pictures = asked.pictures if pictures is None else check_pictures(pictures)
        self.url, self.model = f"{url.rstrip('/')}/chat/completions", model
        self.question, self.draws = asked.text, draws
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
            self._tell_missing(error.args[0], "the question names")
            return None, ""
        shown = {kind: pictures_of(item, kind) for kind in self.pictures}
        for kind, pictures in shown.items():
            if not pictures:
                self._tell_missing(ROW_KEYS[kind], "`pictures` asks for")
                return None, ""
        body = json.dumps(self._request(question, shown)).encode()
        try:
            reply = await self._post(client, body)
        except (Unscored, Failure) as error:
            self.heard.failure = str(error)
            return float("nan"), str(error)
        self.heard.answers += 1
        try:
            return self._read(reply), ""
        except Unscored as error:
            return float("nan"), str(error)

    def _read(self, answer: Any) -> float:
        """The mean of the draws that can be read. Raises Unscored where none can."""
        scores, unread = [], None
        for choice in choices(answer, self.draws):
            try:
                scores.append(self.reading.read(choice))
            except Unscored as error:
                unread = error
        if not scores:
            raise unread
        return sum(scores) / len(scores)

    def _tell_missing(self, key: str, who: str) -> None:
        """Once: it may be a mistake of spelling."""
        if key not in self.missing:
            self.missing.add(key)
            told = "judge at %s does not apply to rows without %r, which %s"
            logger.warning(told, self.url, key, who)

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

    def _request(self, question: str, shown: dict[str, list[Image.Image]]) -> dict[str, Any]:
        order = order_told({kind: len(pictures) for kind, pictures in shown.items()})
        text = f"{order}{question}\n{self.reading.instruction}"
        urls = [data_url(picture) for pictures in shown.values() for picture in pictures]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        request = {
            "model": self.model,
            "temperature": TEMPERATURE if self.draws > 1 else 0,
            "max_tokens": self.reading.max_tokens,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        }
        if self.reading.logprobs:  # 20: the most that OpenAI and vLLM allow
            request |= {"logprobs": True, "top_logprobs": 20}
        return request | ({"n": self.draws} if self.draws > 1 else {})

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
