"""The half of the reward server that knows HTTP and no Ray: what is refused before anything is
scored.

    socket -> uvicorn -> Front: token, path, type, length -> body -> score(body) -> (status, JSON)

``Front`` is an ASGI application. It reads a body only from those who know the token, only where its
length is declared and within the limit, and holds at most ``MAX_WAITING`` of them. What a body
means is up to ``score``.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from rlalign.web.listening import Gone, Message, Receive, Send, read_body
from rlalign.web.protocol import MAX_BODY_BYTES
from rlalign.web.refused import Refused, error_body
from rlalign.web.token import knows_token

MAX_WAITING = 32
MAX_WAITING_BYTES = 8 * MAX_BODY_BYTES
"""Requests, and their bytes, that are read, waiting or scored at one time; the next one is told to
come back (503)."""

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
        except Gone:
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
            return await self.score(await read_body(length, receive))
        finally:
            self.waiting -= 1
            self.waiting_bytes -= length
