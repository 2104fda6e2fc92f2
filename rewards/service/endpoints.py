"""Asks servers that offer the same: fail-over and retries."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from duet.configs.errors import UserError
from duet.rewards.service.http import Client, Failure, Silence, converse, excerpt
from duet.rewards.service.pictures import WireError
from duet.rewards.service.wire import read_token

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


class Busy(Failure):
    again = True


@dataclass
class Conversation:
    """The requests of one call.

    Once a request has failed everywhere, urls that stayed silent are not asked again: a
    server that hangs costs a call its time-outs once, whatever the number of requests.
    """

    endpoints: Endpoints
    client: Client
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
        token = read_token(self.endpoints.token_env)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        reply = await self.client.request(url + path, body, headers)
        told = f"HTTP {reply.status}: {excerpt(reply.body)}"
        if reply.status in (401, 403):
            raise UserError(f"{url} refuses the token of {self.endpoints.token_env}: {told}")
        if reply.status == 429 or reply.status >= 500:
            raise Busy(told)
        if reply.status != 200:
            raise Failure(told)
        try:
            return read(reply.body)
        except WireError as error:
            raise Failure(str(error)) from error


def ask_all(endpoints: Endpoints, talk: Callable[[Conversation], Awaitable[T]]) -> T:
    """Run a coroutine of requests to its end; raises what it raises."""
    return converse(endpoints.timeout_seconds, lambda client: talk(Conversation(endpoints, client)))
