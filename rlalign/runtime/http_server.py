"""The half of the reward server that knows HTTP and no Ray: what is refused before anything is scored, and how it listens.

    socket -> uvicorn -> Front: token, path, type, length -> body -> score(body) -> (status, JSON)

``Front`` is an ASGI application. It reads a body only from those who know the token, only where its length is declared and
within the limit, and holds at most ``MAX_WAITING`` of them. What a body means is up to ``score``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlalign.http_protocol import MAX_BODY_BYTES, Refused, error_body, read_request, scores_body
from rlalign.http_token import knows_token
from rlalign.registry import UserError
from rlalign.rewards.base import Reward, Scorer, score

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_WAITING = 32
MAX_WAITING_BYTES = 8 * MAX_BODY_BYTES
"""Requests, and their bytes, that are read, waiting or scored at one time; the next one is told to come back (503)."""

MAX_CONNECTIONS = 256
MAX_HEADER_BYTES = 16 * 1024
BODY_SECONDS = 30.0
"""How long a client may take to send a body."""

RETRY_AFTER_SECONDS = 1


def answer(reward: Reward, scorer: Scorer, body: bytes) -> tuple[int, bytes]:
    """(status, body) of the answer to a request's body: 200 with scores, or one sentence on what is wrong with whom.

    Under ``on_error: raise`` a score that is not finite is answered as null, so that the client's policy decides; a reward
    that raises is 500, or 422 where it says itself that the request is the mistake.
    """
    failures: list[Exception] = []

    def heard(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        try:
            return scorer(media_BFCHW, prompts)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a user's scorer raises
            failures.append(error)
            return torch.full((len(prompts),), torch.nan)

    try:
        media_BFCHW, prompts = read_request(body)
        if reward.on_error == "raise":
            score_B = score(reward.model_copy(update={"on_error": "drop"}), heard, media_BFCHW, prompts)
        else:
            score_B = score(reward, scorer, media_BFCHW, prompts)
    except Refused as error:
        return error.status, error_body(error.sentence)
    except UserError as error:
        return 422, error_body(str(error))
    if failures:
        logger.error("the reward %s failed", reward.title, exc_info=failures[0])
        said = ": ".join([type(failures[0]).__name__, *str(failures[0]).strip().splitlines()[:1]])
        return 500, error_body(f"the reward {reward.title} failed: {said[:300]}")
    return 200, scores_body(score_B, reward.title)


@dataclass(kw_only=True)
class Front:
    """The ASGI application: ``GET /health`` and ``POST /score``, for those who know the token."""

    title: str
    score: Callable[[bytes], Awaitable[tuple[int, bytes]]]
    token: bytes | None
    """Digest of the token; None serves everybody."""
    waiting: int = field(default=0, init=False)
    waiting_bytes: int = field(default=0, init=False)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        assert scope["type"] == "http", scope["type"]  # the server below speaks nothing else
        extra: list[tuple[bytes, bytes]] = []
        try:
            length = self._allowed(scope)
            if length is None:
                status, body = 200, json.dumps({"reward": self.title, "waiting": self.waiting}).encode()
            else:
                status, body = await self._scored(length, receive)
        except Refused as error:
            status, body = error.status, error_body(error.sentence)
        except _Gone:
            return
        if status == 401:
            extra = [(b"www-authenticate", b"Bearer")]
        elif status == 405:
            extra = [(b"allow", b"GET" if scope["path"] == "/health" else b"POST")]
        elif status == 503:
            extra = [(b"retry-after", str(RETRY_AFTER_SECONDS).encode())]
        elif status in (408, 413):
            extra = [(b"connection", b"close")]  # what is still coming is not read
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *extra]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""})

    def _allowed(self, scope: Message) -> int | None:
        """The length of the body to score, None for /health. Raises Refused."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        if self.token is not None and not knows_token(headers.get(b"authorization", []), self.token):
            raise Refused(401, "the header Authorization must read: Bearer and the token")
        methods = {"/health": "GET", "/score": "POST"}
        if scope["path"] not in methods:
            raise Refused(404, "there are GET /health and POST /score")
        if scope["method"] != methods[scope["path"]]:
            raise Refused(405, f"{scope['path']} takes {methods[scope['path']]}")
        if scope["path"] == "/health":
            return None
        kind = b",".join(headers.get(b"content-type", [])).split(b";")[0].strip().lower()
        if kind != b"application/json" or headers.get(b"content-encoding", [b"identity"]) != [b"identity"]:
            raise Refused(415, "the body must be application/json, without a content encoding")
        lengths = headers.get(b"content-length", [])
        if len(lengths) != 1 or not lengths[0].isdigit():
            raise Refused(411, "the header Content-Length must say how long the body is")
        if len(lengths[0]) > 18 or int(lengths[0]) > MAX_BODY_BYTES:
            raise Refused(413, f"a request has at most {MAX_BODY_BYTES:,} bytes; send fewer pictures in one")
        return int(lengths[0])

    async def _scored(self, length: int, receive: Receive) -> tuple[int, bytes]:
        if self.waiting >= MAX_WAITING or self.waiting_bytes + length > MAX_WAITING_BYTES:
            raise Refused(503, "too many requests are waiting; come back in a moment")
        self.waiting += 1
        self.waiting_bytes += length
        try:
            return await self.score(await _read(length, receive))
        finally:
            self.waiting -= 1
            self.waiting_bytes -= length


class _Gone(Exception):
    """The client has hung up."""


async def _read(length: int, receive: Receive) -> bytes:
    """A body of at most ``length`` bytes. Raises Refused where it takes too long."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                body += message.get("body", b"")
                if len(body) > length:
                    raise Refused(413, "the body is longer than Content-Length says")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise Refused(408, f"the body must arrive within {BODY_SECONDS:g} seconds") from error


# --- listening --------------------------------------------------------------------------------------------------------


def bound(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet. Raises UserError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
        except OSError:
            made.close()
            raise
        return made
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); "
            "name an address of this machine and a free port"
        ) from error


def url_of(made: socket.socket, *, encrypted: bool) -> str:
    """The URL under which a socket answers."""
    host, port = made.getsockname()[:2]
    return f"http{'s' if encrypted else ''}://{f'[{host}]' if ':' in host else host}:{port}"


async def listen(front: Front, made: socket.socket, *, on_ready: Callable[[], None], **certificate: str) -> None:
    """Serves until SIGINT or SIGTERM, then lets the requests under way finish. In a thread: until it is cancelled."""
    import uvicorn

    # h11 bounds what a request's head may hold; without lifespan and websockets there is nothing but requests
    config = uvicorn.Config(
        front,
        http="h11",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # a stranger's malformed requests fill no log
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=10,
        **certificate,  # type: ignore[arg-type]
    )
    config.load()
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign] - it would raise them again at the end

    def end() -> None:
        server.should_exit = True

    loop = asyncio.get_running_loop()
    with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread: no signal comes here
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
    serving = asyncio.create_task(server.serve(sockets=[made]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if not serving.done():
            on_ready()
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        end()
        await serving
        raise
