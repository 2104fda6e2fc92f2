"""Asks servers that offer the same: fail-over, retries, and a bound on time and size.

asyncio, because its deadline ends anything, a header that drips in too: httpx's own
time-outs begin anew with every byte.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import httpx

from duet.configs.errors import UserError
from duet.rewards.service.pictures import WireError
from duet.rewards.service.wire import excerpt, read_token

MAX_REPLY = 2**20  # bytes; a score takes about twenty
_jitter = random.Random()  # of its own: a retry must not move a run's random numbers
T = TypeVar("T")


@dataclass
class Endpoints:
    urls: list[str]  # the one that answered last comes first
    timeout_seconds: float  # the longest that a request may take, connecting included
    retries: int  # further rounds over the urls
    backoff_seconds: float  # pause before the first of them; doubles with each
    token_env: str  # environment variable

    def prefer(self, url: str) -> None:
        self.urls.remove(url)
        self.urls.insert(0, url)

    def pause(self, attempt: int) -> float:
        """Seconds; spread by half, so that many clients do not march in step."""
        return self.backoff_seconds * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.5)


class Failure(Exception):
    """No good answer: the message tells why."""

    again = False  # whether another attempt may help


class Busy(Failure):
    again = True


class Silence(Failure):
    again = True


@dataclass
class Conversation:
    """The requests of one call.

    Once a request has failed everywhere, urls that stayed silent are not asked again: a
    server that hangs costs a call its time-outs once, whatever the number of requests.
    """

    endpoints: Endpoints
    client: httpx.AsyncClient
    failures: dict[str, Failure] = field(default_factory=dict)  # the latest of each url
    gone: set[str] = field(default_factory=set)

    async def ask(
        self, path: str, read: Callable[[bytes], T], body: bytes | None = None
    ) -> T | None:
        """The first good answer to a GET, or to a POST of `body`; None where there is none.

        `read` takes the body of an answer and raises WireError where it is nonsense.
        Raises UserError when a server refuses the token.
        """
        urls = [u for u in self.endpoints.urls if u not in self.gone]
        for attempt in range(self.endpoints.retries + 1):
            if attempt and urls:
                await asyncio.sleep(self.endpoints.pause(attempt))
            for url in list(urls):
                try:
                    answer = await self._request(url, path, read, body)
                except Failure as failure:
                    self.failures[url] = failure
                    if not failure.again:
                        urls.remove(url)
                else:
                    self.endpoints.prefer(url)
                    return answer
        self.gone |= {u for u in urls if isinstance(self.failures[u], Silence)}
        return None

    async def _request(
        self, url: str, path: str, read: Callable[[bytes], T], body: bytes | None
    ) -> T:
        seconds = self.endpoints.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                status, reply = await self._exchange(url + path, body)
        except TimeoutError as error:
            raise Silence(f"no whole answer in {seconds:g} s") from error
        except httpx.HTTPError as error:
            raise Silence(f"{type(error).__name__} {error}".strip()) from error
        told = f"HTTP {status}: {excerpt(reply)}"
        if status in (401, 403):
            raise UserError(f"{url} refuses the token of {self.endpoints.token_env}: {told}")
        if status == 429 or status >= 500:
            raise Busy(told)
        if status != 200:
            raise Failure(told)
        try:
            return read(reply)
        except WireError as error:
            raise Failure(str(error)) from error

    async def _exchange(self, url: str, body: bytes | None) -> tuple[int, bytes]:
        """Status and body, of bounded size as it came (nothing is inflated)."""
        token = read_token(self.endpoints.token_env)
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        method, reply = "GET" if body is None else "POST", bytearray()
        async with self.client.stream(method, url, content=body, headers=headers) as response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise Failure("an encoding that was not asked for")
            async for chunk in response.aiter_raw():
                reply += chunk
                if len(reply) > MAX_REPLY:
                    raise Failure(f"more than {MAX_REPLY} bytes")
        return response.status_code, bytes(reply)


def converse(endpoints: Endpoints, talk: Callable[[Conversation], Awaitable[T]]) -> T:
    """Run a coroutine of requests to its end; raises what it raises."""

    async def run() -> T:
        async with httpx.AsyncClient(timeout=None) as client:
            return await talk(Conversation(endpoints, client))

    # a thread of its own: a notebook's has an event loop already
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, run()).result()
