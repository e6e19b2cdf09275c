"""What every request passes before the page sees it, and the headers of every answer.

    host -> origin and kind of a POST -> length of its body -> the application

The browser is told to run nothing but this server's own files, and to send nothing elsewhere. A
POST must come from a page of this server: its cookie is SameSite=Strict, and its Origin, which
every browser sends with a POST, must be the server's. On a loopback address only loopback names are
served, so that no other page can reach it by a name of its own that points there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rlalign.web.listening import Application, Message, Receive, Send
from rlalign.web.token import is_loopback
from rlalign.web.vote.desk import Declined
from rlalign.web.vote.messages import MAX_BODY_BYTES

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
"""On every answer."""

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
MAX_PATH_CHARACTERS = 500


@dataclass(kw_only=True)
class Guard:
    """An ASGI application around another one."""

    application: Application
    origin: str = ""
    """Where people find the page ("https://vote.example.org"), "" for wherever it is asked."""
    loopback: bool = True
    """Whether it listens on loopback alone."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request."""
        assert scope["type"] == "http", scope["type"]

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message.get("headers", [])}
                more = HEADERS if b"cache-control" in given else HEADERS | NOT_KEPT
                own = [(k.encode(), v.encode()) for k, v in more.items() if k.encode() not in given]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        try:
            self._check(scope)
        except Declined as error:
            await send_declined(error, send_guarded)
            return
        await self.application(scope, receive, send_guarded)

    def _check(self, scope: Message) -> None:
        """Raises Declined for what is not handed on."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

        # where the browser believes to be
        if len(scope.get("path", "")) > MAX_PATH_CHARACTERS:
            raise Declined(414, "malformed", "the address is too long")
        hosts = headers.get("host", [])
        if len(hosts) != 1:
            raise Declined(400, "malformed", "the header Host must be there once")
        if not self._serves(hosts[0]):
            raise Declined(
                421, "host", f"this page is not served under the name {hosts[0][:100]!r}"
            )
        if scope["method"] in ("GET", "HEAD"):
            return
        if scope["method"] != "POST":
            raise Declined(405, "malformed", "a page is asked by GET, HEAD and POST")

        # a POST comes from this page, and says what it is and how long
        expected = self.origin or f"{scope['scheme']}://{hosts[0]}"
        if headers.get("origin", []) != [expected]:
            raise Declined(403, "origin", "the header Origin must name this page's own address")
        if headers.get("sec-fetch-site", ["same-origin"]) != ["same-origin"]:
            raise Declined(403, "origin", "a request from another site is not taken")
        self._check_body(headers, FORM if scope["path"] == "/admin" else JSON)

    def _serves(self, host: str) -> bool:
        if self.origin:
            return host == urlsplit(self.origin).netloc
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return not self.loopback or is_loopback(name)

    @staticmethod
    def _check_body(headers: Mapping[str, list[str]], kind: str) -> None:
        said = headers.get("content-type", [])
        if len(said) != 1 or said[0].split(";")[0].strip().lower() != kind:
            raise Declined(415, "malformed", f"the body must be {kind}")
        if headers.get("content-encoding", ["identity"]) != ["identity"]:
            raise Declined(415, "malformed", "the body must have no content encoding")
        lengths = headers.get("content-length", [])
        if len(lengths) != 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
            raise Declined(411, "malformed", "Content-Length must say how long the body is")
        if len(lengths[0]) > 9 or int(lengths[0]) > MAX_BODY_BYTES:
            raise Declined(413, "malformed", f"a body has at most {MAX_BODY_BYTES:,} bytes")


NOT_KEPT = {"cache-control": "no-store"}


def declined_json(error: Declined) -> dict[str, Any]:
    """The body of an answer to what is not served."""
    return {"error": error.sentence, "code": error.code}


async def send_declined(error: Declined, send: Send) -> None:
    """An answer to what is not served, from outside the application."""
    body = json.dumps(declined_json(error)).encode()
    headers = [(b"content-type", JSON.encode()), (b"content-length", str(len(body)).encode())]
    if error.status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
