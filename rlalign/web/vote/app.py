"""The routes of the page.

    GET  /               the page                    POST /join      a person joins
    GET  /ballot         the open ballot, 202 where there is none now
    POST /vote           a vote, and what comes after it
    POST /undo           the last ballot again       POST /prompts   a prompt, or the next one
    GET  /picture/KEY    a picture, for this person  GET  /progress  server-sent events
    GET  /results        the numbers (administrator) GET  /results.json, /export
    POST /admin          the administrator's token   GET  /health, /static/FILE

A person is who the signed cookie says. A refusal is ``{"error": sentence, "code": code}``.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from rlalign.core.files import dump_json
from rlalign.web.listening import Application, Gone, read_body
from rlalign.web.refused import Refused
from rlalign.web.token import digest, knows_token
from rlalign.web.vote import messages
from rlalign.web.vote.desk import Declined, Desk, Sheet
from rlalign.web.vote.guard import Guard, declined_json
from rlalign.web.vote.people import Secret
from rlalign.web.vote.rates import Rate, network_of
from rlalign.web.vote.templates import STATIC, Reader, Templates
from rlalign.web.vote.words import Blocked

COOKIE = "rlalign-vote"
COOKIE_SECONDS = 60 * 24 * 3600
HEARTBEAT_SECONDS = 15.0
"""An event stream says something at least this often, so that nobody takes it for dead."""
STREAMS_OF_A_PERSON = 4
ADMIN = "administrator"
"""Whose keys the pictures on /results have; no id of a person is a word."""


@dataclass(kw_only=True)
class Page:
    """The application's parts; ``application()`` is what a server serves."""

    desk: Desk
    secret: Secret
    templates: Templates
    blocked: Blocked
    origin: str = ""
    loopback: bool = True
    encrypted: bool = False
    with_token: bool = False
    """Whether joining needs a join link."""
    admin: bytes | None = None
    """Digest of the administrator's token; None shows the results to everybody who can reach the
    page, which is for loopback."""
    by_person: Rate = field(default_factory=lambda: Rate(per_second=5, burst=60))
    by_address: Rate = field(default_factory=lambda: Rate(per_second=100, burst=600))
    _streams: dict[str, int] = field(default_factory=dict, init=False)
    _ends: set[asyncio.Event] = field(default_factory=set, init=False)
    _ending: bool = field(default=False, init=False)

    def application(self) -> Application:
        """The ASGI application, with all that stands before it."""
        routes = [
            Route("/", self._index),
            Route("/join", self._join, methods=["POST"]),
            Route("/ballot", self._ballot),
            Route("/vote", self._vote, methods=["POST"]),
            Route("/undo", self._undo, methods=["POST"]),
            Route("/prompts", self._prompts, methods=["POST"]),
            Route("/picture/{key:str}", self._picture),
            Route("/progress", self._progress),
            Route("/results", self._results),
            Route("/results.json", self._results_json),
            Route("/export", self._export),
            Route("/admin", self._admin, methods=["POST"]),
            Route("/health", self._health),
            Route("/favicon.ico", _icon),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]
        sessions = Middleware(
            SessionMiddleware,
            secret_key=self.secret.text,
            session_cookie=COOKIE,
            max_age=COOKIE_SECONDS,
            same_site="strict",
            https_only=self.encrypted,
        )
        application = Starlette(
            routes=routes,
            middleware=[sessions],
            exception_handlers={
                Refused: _say_refused,
                HTTPException: _say_http,
                Gone: _say_nothing,
                Exception: _say_fault,
            },
        )
        return Guard(application=application, origin=self.origin, loopback=self.loopback)

    def end(self) -> None:
        """Ends the event streams, which would not end by themselves."""
        self._ending = True
        for event in self._ends:
            event.set()

    # --- people -----------------------------------------------------------------------------------

    async def _index(self, request: Request) -> Response:
        self._take_address(request)
        about = self.desk.about
        html = self.templates.index(about, _reader(request), with_token=self.with_token)
        return _html(html)

    async def _join(self, request: Request) -> Response:
        self._take_address(request)
        token, name, consent = messages.read_join(await _body(request))

        # who has joined already stays who he is, unless a link says otherwise
        known = request.session.get("annotator", "")
        if not token and known and await run_in_threadpool(self.desk.knows, known):
            return JSONResponse({"joined": True})
        if self.with_token and self.secret.invites(token) is None:
            raise Declined(403, "join", "this page needs a join link of its own")
        if self.desk.about.consent and consent != self.desk.about.consent_version:
            raise Declined(400, "consent", "the text on the page must be agreed to first")
        if self.blocked.holds(name):
            raise Declined(400, "name", "this name is not taken; choose another")

        annotator = await run_in_threadpool(self.desk.join, token, name, consent)
        request.session["annotator"] = annotator
        return JSONResponse({"joined": True})

    async def _person(self, request: Request) -> str:
        """The person who asks, within both rates. Raises Declined."""
        self._take_address(request)
        annotator = request.session.get("annotator", "")
        if not isinstance(annotator, str) or not annotator:
            raise Declined(401, "join", "join first")
        self._take(self.by_person, annotator)
        return annotator

    def _take_address(self, request: Request) -> None:
        host = request.client.host if request.client else "none"
        self._take(self.by_address, network_of(host))

    @staticmethod
    def _take(rate: Rate, asker: str) -> None:
        seconds = rate.take(asker)
        if seconds:
            raise _TooFast(seconds)

    # --- ballots ----------------------------------------------------------------------------------

    async def _ballot(self, request: Request) -> Response:
        # who has not joined is told so without an error, which a browser would write down
        if not request.session.get("annotator"):
            self._take_address(request)
            return JSONResponse({"waiting": "join"}, status_code=202)
        annotator = await self._person(request)
        return self._answer(await run_in_threadpool(self._following, annotator))

    async def _vote(self, request: Request) -> Response:
        annotator = await self._person(request)
        choice = messages.read_vote(await _body(request))
        receipt = await run_in_threadpool(self.desk.vote, annotator, choice)
        self.desk.notice.ring(annotator)
        following = await run_in_threadpool(self._following, annotator)
        return JSONResponse(messages.receipt_json(receipt, following))

    async def _undo(self, request: Request) -> Response:
        annotator = await self._person(request)
        nonce = messages.read_undo(await _body(request))
        undone = await run_in_threadpool(self.desk.undo, annotator, nonce)
        if not undone:
            raise Declined(409, "undo", "there is no choice to take back")
        self.desk.notice.ring(annotator)
        return self._answer(await run_in_threadpool(self._following, annotator))

    async def _prompts(self, request: Request) -> Response:
        annotator = await self._person(request)
        text = messages.read_prompt(await _body(request))
        if text and not self.desk.about.typing:
            raise Declined(403, "typing", "this page takes no prompts of your own")
        if self.blocked.holds(text):
            raise Declined(400, "blocked", "this prompt has a word that this page does not draw")
        await run_in_threadpool(self.desk.prompt, annotator, text)
        return self._answer(await run_in_threadpool(self._following, annotator))

    def _following(self, annotator: str) -> dict[str, Any]:
        """What this person sees next: a ballot, or why there is none."""

        def key_of(uid: str) -> str:
            return self.secret.key_of(annotator, uid)

        found = self.desk.ballot(annotator)
        if isinstance(found, Sheet):
            return messages.sheet_json(found, self.desk.about.allowed, key_of)
        return messages.waiting_json(found, key_of)

    @staticmethod
    def _answer(following: dict[str, Any]) -> Response:
        return JSONResponse(following, status_code=202 if "waiting" in following else 200)

    async def _picture(self, request: Request) -> Response:
        # no rate of the person's: a ballot of six is six requests, and most come from the cache
        self._take_address(request)
        key = request.path_params["key"]
        annotator = request.session.get("annotator", "")
        uid = self.secret.uid_of(annotator, key) if annotator else None
        if uid is None and self._is_admin(request):
            uid = self.secret.uid_of(ADMIN, key)
        if uid is None:
            raise Declined(404, "picture", "there is no such picture for you")
        content = await run_in_threadpool(self.desk.picture, uid)
        return Response(content, headers=_picture_headers(content))

    # --- events -----------------------------------------------------------------------------------

    async def _progress(self, request: Request) -> Response:
        annotator = await self._person(request)
        if self._streams.get(annotator, 0) >= STREAMS_OF_A_PERSON:
            raise Declined(429, "streams", "this page is open in too many tabs")
        return StreamingResponse(
            self._events(annotator),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    async def _events(self, annotator: str) -> AsyncIterator[str]:
        """The person's progress whenever it has changed."""
        # a ring comes from any thread
        loop = asyncio.get_running_loop()
        rung = asyncio.Event()

        def ring(whom: str) -> None:
            if whom in ("", annotator):
                loop.call_soon_threadsafe(rung.set)

        leave = self.desk.notice.listen(ring)
        self._ends.add(rung)
        self._streams[annotator] = self._streams.get(annotator, 0) + 1
        try:
            yield "retry: 2000\n\n"
            said = ""
            while not self._ending:
                rung.clear()
                progress = await run_in_threadpool(self.desk.progress, annotator)
                now = dump_json(messages.progress_json(progress))
                if now != said:
                    yield f"data: {now}\n\n"
                    said = now
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        await rung.wait()
                except TimeoutError:
                    yield ": still here\n\n"
        finally:
            leave()
            self._ends.discard(rung)
            self._streams[annotator] -= 1
            if not self._streams[annotator]:
                del self._streams[annotator]

    # --- the administrator ------------------------------------------------------------------------

    async def _results(self, request: Request) -> Response:
        self._take_address(request)
        if not self._is_admin(request):
            return _html(self.templates.admin(_reader(request)), status=401)
        found = await run_in_threadpool(self.desk.results)
        about = self.desk.about
        key_of = partial(self.secret.key_of, ADMIN)
        return _html(self.templates.results(about, found, _reader(request), key_of))

    async def _results_json(self, request: Request) -> Response:
        self._ask_admin(request)
        results = await run_in_threadpool(self.desk.results)
        return Response(dump_json(results), media_type="application/json")

    async def _export(self, request: Request) -> Response:
        self._ask_admin(request)
        lines: Iterator[str] = self.desk.export()
        return StreamingResponse(
            (f"{line}\n" for line in lines),
            media_type="application/x-ndjson",
            headers={"content-disposition": 'attachment; filename="votes.jsonl"'},
        )

    async def _admin(self, request: Request) -> Response:
        self._take_address(request)
        sent = parse_qs((await _body(request)).decode("utf-8", "replace"), max_num_fields=4)
        token = sent.get("token", [""])[0]
        if self.admin is None or not hmac.compare_digest(digest(token), self.admin):
            raise Declined(403, "admin", "this is not the administrator's token")
        request.session["admin"] = self.admin.hex()[:16]
        return RedirectResponse("/results", status_code=303)

    def _ask_admin(self, request: Request) -> None:
        self._take_address(request)
        if not self._is_admin(request):
            raise Declined(401, "admin", "send the administrator's token as a bearer token")

    def _is_admin(self, request: Request) -> bool:
        if self.admin is None:
            return True
        kept = request.session.get("admin", "")
        sent = [value.encode() for value in request.headers.getlist("authorization")]
        return kept == self.admin.hex()[:16] or knows_token(sent, self.admin)

    async def _health(self, request: Request) -> Response:
        self._take_address(request)
        return JSONResponse({"page": self.desk.about.title, "streams": len(self._ends)})


class _TooFast(Declined):
    """Somebody asks more often than the page takes."""

    def __init__(self, seconds: float) -> None:
        super().__init__(429, "slow", "too many requests; wait a moment")
        self.seconds = seconds


async def _icon(_: Request) -> Response:
    return RedirectResponse("/static/icon.svg")


def _reader(request: Request) -> Reader:
    return Reader(
        language=request.cookies.get("lang", ""),
        accepted=request.headers.get("accept-language", ""),
        theme=request.cookies.get("theme", ""),
    )


async def _body(request: Request) -> bytes:
    """The body, whose declared length the guard has seen."""
    return await read_body(int(request.headers["content-length"]), request.receive)


def _html(text: str, status: int = 200) -> Response:
    return Response(text, status_code=status, media_type="text/html")


_KINDS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"RIFF", "image/webp"),
)
"""First bytes -> what they begin. Whatever else a file is, no browser is told to run it."""


def _picture_headers(content: bytes) -> dict[str, str]:
    kind = next((kind for start, kind in _KINDS if content.startswith(start)), "")
    return {
        "content-type": kind or "application/octet-stream",
        "cache-control": "private, max-age=604800, immutable",
    }


async def _say_refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    if not isinstance(error, Declined):
        error = Declined(error.status, "malformed", error.sentence)
    headers = {"retry-after": "1"} if error.status == 429 else {}
    return JSONResponse(declined_json(error), status_code=error.status, headers=headers)


async def _say_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {"error": str(error.detail), "code": "malformed"}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _say_fault(_: Request, __: Exception) -> Response:
    """For a fault of ours; the server writes its traceback down."""
    return JSONResponse({"error": "this is a fault of the page", "code": "fault"}, status_code=500)


async def _say_nothing(_: Request, __: Exception) -> Response:
    """For a client that has hung up."""
    return Response(status_code=400)
