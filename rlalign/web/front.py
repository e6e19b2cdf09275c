"""The half of the reward server that knows HTTP and no Ray: what is refused before anything is
scored, and how it listens.

    socket -> uvicorn -> Front: token, path, type, length -> body -> score(body) -> (status, JSON)

``Front`` is an ASGI application. It reads a body only from those who know the token, only where its
length is declared and within the limit, and holds at most ``MAX_WAITING`` of them. What a body
means is up to ``score``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlalign.core.registry import UserError
from rlalign.web.protocol import MAX_BODY_BYTES, Refused, error_body
from rlalign.web.token import knows_token

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_WAITING = 32
MAX_WAITING_BYTES = 8 * MAX_BODY_BYTES
"""Requests, and their bytes, that are read, waiting or scored at one time; the next one is told to
come back (503)."""

MAX_CONNECTIONS = 256
MAX_HEADER_BYTES = 16 * 1024
BODY_SECONDS = 30.0
"""How long a client may take to send a body."""

RETRY_AFTER_SECONDS = 1


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
        # the server below speaks nothing else
        assert scope["type"] == "http", scope["type"]
        extra: list[tuple[bytes, bytes]] = []

        # the answer, or why there is none
        try:
            length = self._allowed(scope)
            if length is None:
                status = 200
                body = json.dumps({"reward": self.title, "waiting": self.waiting}).encode()
            else:
                status, body = await self._scored(length, receive)
        except Refused as error:
            status = error.status
            body = error_body(error.sentence)
        except _Gone:
            return

        # what a client has to know besides
        if status == 401:
            extra = [(b"www-authenticate", b"Bearer")]
        elif status == 405:
            extra = [(b"allow", b"GET" if scope["path"] == "/health" else b"POST")]
        elif status == 503:
            extra = [(b"retry-after", str(RETRY_AFTER_SECONDS).encode())]
        elif status in (408, 413):
            # what is still coming is not read
            extra = [(b"connection", b"close")]
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *extra,
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send(
            {"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""}
        )

    def _allowed(self, scope: Message) -> int | None:
        """The length of the body to score, None for /health. Raises Refused."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)

        # who may ask, and for what
        if self.token is not None and not knows_token(
            headers.get(b"authorization", []), self.token
        ):
            raise Refused(401, "the header Authorization must read: Bearer and the token")
        methods = {"/health": "GET", "/score": "POST"}
        if scope["path"] not in methods:
            raise Refused(404, "there are GET /health and POST /score")
        if scope["method"] != methods[scope["path"]]:
            raise Refused(405, f"{scope['path']} takes {methods[scope['path']]}")
        if scope["path"] == "/health":
            return None

        # what the body is, and how long
        kind = b",".join(headers.get(b"content-type", [])).split(b";")[0].strip().lower()
        if kind != b"application/json" or headers.get(b"content-encoding", [b"identity"]) != [
            b"identity"
        ]:
            raise Refused(415, "the body must be application/json, without a content encoding")
        lengths = headers.get(b"content-length", [])
        if len(lengths) != 1 or not lengths[0].isdigit():
            raise Refused(411, "the header Content-Length must say how long the body is")
        if len(lengths[0]) > 18 or int(lengths[0]) > MAX_BODY_BYTES:
            raise Refused(
                413, f"a request has at most {MAX_BODY_BYTES:,} bytes; send fewer pictures in one"
            )
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


# --- listening -----------------------------------------------------------------------------------


def bound(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet. Raises UserError where the address
    cannot be had."""
    # a busy port is refused before anything is loaded
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
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


async def listen(
    front: Front, made: socket.socket, *, on_ready: Callable[[], None], **certificate: str
) -> None:
    """Serves until SIGINT or SIGTERM, then lets the requests under way finish. In a thread: until
    it is cancelled."""
    # whoever ends it lets open requests be answered
    server = _server(front, certificate)

    def end() -> None:
        server.should_exit = True

    # a signal ends the server, and so does the end of the task
    loop = asyncio.get_running_loop()

    # in another thread no signal comes
    with contextlib.suppress(RuntimeError, ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)

    # the caller hears of the start only once requests are taken
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


def _server(front: Front, certificate: Mapping[str, str]) -> uvicorn.Server:
    import uvicorn

    # h11 bounds what a request's head may hold; without lifespan and websockets there is nothing
    # but requests
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

    # it would raise the signals again at the end
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    return server
