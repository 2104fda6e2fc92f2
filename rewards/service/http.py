"""The one HTTP client: a request ends in time, and its answer is of bounded size.

asyncio, because its deadline ends anything, a header that drips in too: httpx's own
time-outs begin anew with every byte.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import httpx

MAX_REPLY = 2**20  # bytes; a score takes about twenty, a judge's log-probs some ten thousand
T = TypeVar("T")


class Failure(Exception):
    """No good answer: the message tells why."""

    again = False  # whether another attempt may help


class Silence(Failure):
    """No whole answer came."""

    again = True


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes


@dataclass(frozen=True)
class Client:
    http: httpx.AsyncClient
    timeout_seconds: float  # the longest that a request may take, connecting included

    async def request(
        self, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """A GET, or a POST of `body`, which is JSON.

        Raises Failure for no answer in time, a broken or too long one, an encoding.
        """
        try:
            async with asyncio.timeout(self.timeout_seconds):
                return await self._exchange(url, body, headers or {})
        except TimeoutError as error:
            raise Silence(f"no whole answer in {self.timeout_seconds:g} s") from error
        except httpx.HTTPError as error:
            raise Silence(f"{type(error).__name__} {error}".strip()) from error

    async def _exchange(self, url: str, body: bytes | None, headers: Mapping[str, str]) -> Reply:
        """The body is as it came: nothing is inflated."""
        given = {"Accept-Encoding": "identity", "Content-Type": "application/json", **headers}
        method, reply = "GET" if body is None else "POST", bytearray()
        async with self.http.stream(method, url, content=body, headers=given) as response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise Failure("an encoding that was not asked for")
            async for chunk in response.aiter_raw():
                reply += chunk
                if len(reply) > MAX_REPLY:
                    raise Failure(f"more than {MAX_REPLY} bytes")
        return Reply(response.status_code, bytes(reply))


def converse(timeout_seconds: float, talk: Callable[[Client], Awaitable[T]]) -> T:
    """Run a coroutine of requests to its end; raises what it raises."""

    async def run() -> T:
        async with httpx.AsyncClient(timeout=None) as http:
            return await talk(Client(http, timeout_seconds))

    # a thread of its own: a notebook's has an event loop already
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, run()).result()


def excerpt(body: bytes) -> str:
    """The beginning of a body, for a message of one line."""
    return ascii(" ".join(body[:160].decode(errors="replace").split()))


def is_address(url: object) -> bool:
    """Whether requests can be sent there: http(s), a host, no query."""
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        return False
    http = parts.scheme in ("http", "https") and parts.host != "" and (parts.port or 80) < 2**16
    return http and not parts.query and not parts.fragment
