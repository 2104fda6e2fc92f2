"""The server of rewards: FastAPI under uvicorn, the form in rewards/service/wire.py."""

import asyncio
import contextlib
import logging
import secrets
import socket
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from duet.configs.errors import UserError
from duet.configs.schema import RewardConfig
from duet.rewards.base import Reward, score
from duet.rewards.registry import load_reward, load_weights
from duet.rewards.service import patience
from duet.rewards.service.patience import PatientProtocol
from duet.rewards.service.pictures import WireError
from duet.rewards.service.wire import (
    TOKEN_ENV,
    Health,
    decode_request,
    encode_health,
    encode_scores,
    read_token,
)

_log = logging.getLogger(__name__)


def serve(configs: Sequence[RewardConfig], host: str, port: int, max_body: int) -> None:
    """Serve rewards by their metric names until interrupted; `max_body` in bytes.

    The server answers at once, and is ready when all weights are loaded.
    Raises UserError for a reward that cannot be built or loaded, and for a taken port.
    """
    rewards = {config.metric_name: load_reward(config) for config in configs}
    token = read_token(TOKEN_ENV)
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    with listener, ThreadPoolExecutor(1) as loader:
        loading = loader.submit(load_weights, rewards)
        app = make_app(rewards, loading, token, max_body)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", http=PatientProtocol))
        loading.add_done_callback(lambda done: _stop_on_error(server, done))
        address = f"http://{host}:{listener.getsockname()[1]}"
        guard = f"token of {TOKEN_ENV}" if token else "no token"
        print(f"serving {', '.join(rewards)} on {address} ({guard})", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    loading.result()


def _stop_on_error(server: uvicorn.Server, loading: Future) -> None:
    server.should_exit = loading.exception() is not None


class Refused(Exception):
    """An answer that is no 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def make_app(
    rewards: dict[str, Reward], loading: Future, token: str | None, max_body: int
) -> FastAPI:
    """`loading` is done when all weights are there; `max_body` in bytes."""
    app = FastAPI(title="Duet rewards", docs_url=None, redoc_url=None, openapi_url=None)
    # a reward need not be thread-safe: one request at a time, first come, first served
    turns = {name: asyncio.Lock() for name in rewards}

    @app.exception_handler(Refused)
    async def refuse(request: Request, refused: Refused) -> JSONResponse:
        line = " ".join(str(refused).split())
        # what is left of the body is not waited for
        return JSONResponse({"error": line}, refused.status, {"Connection": "close"})

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        whole_groups = {n: bool(getattr(r, "whole_groups", False)) for n, r in rewards.items()}
        page = Health(_ready(loading), _authorised(request, token), whole_groups)
        return JSONResponse(encode_health(page), 200 if page.ready else 503)

    @app.post("/score/{name:path}")
    async def answer(name: str, request: Request) -> JSONResponse:
        if not _authorised(request, token):
            raise Refused(401, f"give `Authorization: Bearer` with the server's {TOKEN_ENV}")
        if name not in rewards:
            raise Refused(404, f"reward {name!r} is not served: served are {', '.join(rewards)}")
        if not _ready(loading):
            raise Refused(503, "weights are loading")
        body = await _read(request, max_body)
        async with turns[name]:
            if await request.is_disconnected():
                raise Refused(499, "the client has gone")  # it asks again or gave up
            return JSONResponse(await run_in_threadpool(_score, rewards[name], name, body))

    return app


def _ready(loading: Future) -> bool:
    return loading.done() and loading.exception() is None


def _authorised(request: Request, token: str | None) -> bool:
    given = request.headers.get("Authorization", "")
    return token is None or secrets.compare_digest(given.encode(), f"Bearer {token}".encode())


async def _read(request: Request, max_body: int) -> bytes:
    """The body, counted as it comes: it need not tell its length, nor the truth."""
    body = bytearray()
    try:
        async with asyncio.timeout(patience.BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_body:
                    raise Refused(413, f"the body is larger than {max_body} bytes: send less")
    except TimeoutError as error:
        raise Refused(408, f"no whole body in {patience.BODY_SECONDS:g} s") from error
    except ClientDisconnect as error:
        raise Refused(499, "the client has gone") from error
    return bytes(body)


def _score(reward: Reward, name: str, body: bytes) -> dict:
    with tempfile.TemporaryDirectory(prefix="duet-rewards-") as folder:
        try:
            inputs = decode_request(body, Path(folder))
        except WireError as error:
            raise Refused(422, str(error)) from error
        try:
            scores = score(reward, name, inputs, [len(inputs)])
        except UserError as error:
            _log.exception("reward %r", name)
            raise Refused(500, str(error)) from error
    return encode_scores(scores)
