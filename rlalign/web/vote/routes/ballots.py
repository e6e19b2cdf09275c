"""Ballots, and the pictures on them.

GET  /ballot       the open ballot, 202 where there is none now
POST /vote         a vote, and what comes after it
POST /undo         the last ballot again
POST /prompts      a prompt, or the next one
GET  /picture/KEY  a picture, for this person
GET  /film/KEY     all frames of a clip on one sheet, for this person
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from rlalign.web.vote import messages
from rlalign.web.vote.desk import Declined, Desk, Sheet
from rlalign.web.vote.people import Secret
from rlalign.web.vote.routes.answers import body_of, picture_headers
from rlalign.web.vote.routes.results import ADMIN
from rlalign.web.vote.routes.visitors import Visitors, person_of
from rlalign.web.vote.words import Blocked

WIDEST_SHEET = 8192
"""Pixels: telephones draw no wider picture."""


@dataclass(frozen=True, kw_only=True)
class BallotRoutes:
    """What a person who has joined asks and says."""

    desk: Desk
    secret: Secret
    visitors: Visitors
    blocked: Blocked

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/ballot", self._ballot),
            Route("/vote", self._vote, methods=["POST"]),
            Route("/undo", self._undo, methods=["POST"]),
            Route("/prompts", self._prompts, methods=["POST"]),
            Route("/picture/{key:str}", self._picture),
            Route("/film/{key:str}", self._film),
        ]

    async def _ballot(self, request: Request) -> Response:
        # who has not joined is told so without an error, which a browser would write down
        if not person_of(request):
            self.visitors.take_address(request)
            return JSONResponse({"waiting": "join"}, status_code=202)
        annotator = self.visitors.person(request)
        return self._answer(await run_in_threadpool(self._following, annotator))

    async def _vote(self, request: Request) -> Response:
        annotator = self.visitors.person(request)
        choice = messages.read_vote(await body_of(request))
        receipt = await run_in_threadpool(self.desk.vote, annotator, choice)
        self.desk.notice.ring(annotator)
        following = await run_in_threadpool(self._following, annotator)
        return JSONResponse(messages.receipt_json(receipt, following))

    async def _undo(self, request: Request) -> Response:
        annotator = self.visitors.person(request)
        nonce = messages.read_undo(await body_of(request))
        undone = await run_in_threadpool(self.desk.undo, annotator, nonce)
        if not undone:
            raise Declined(409, "undo", "there is no choice to take back")
        self.desk.notice.ring(annotator)
        return self._answer(await run_in_threadpool(self._following, annotator))

    async def _prompts(self, request: Request) -> Response:
        annotator = self.visitors.person(request)
        text = messages.read_prompt(await body_of(request))
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
        content = await self._content(request)
        return Response(content, headers=picture_headers(content))

    async def _film(self, request: Request) -> Response:
        content = await self._content(request)
        sheet, facts = await run_in_threadpool(_sheet_of, content)
        return Response(sheet, headers={**picture_headers(sheet), **facts})

    async def _content(self, request: Request) -> bytes:
        """The file that a key means for this person."""
        # no rate of the person's: a ballot of six is six requests, and most come from the cache
        self.visitors.take_address(request)
        key = request.path_params["key"]
        annotator = person_of(request)
        uid = self.secret.uid_of(annotator, key) if annotator else None
        if uid is None and self.visitors.is_admin(request):
            uid = self.secret.uid_of(ADMIN, key)
        if uid is None:
            raise Declined(404, "picture", "there is no such picture for you")
        return await run_in_threadpool(self.desk.picture, uid)


def _sheet_of(content: bytes) -> tuple[bytes, dict[str, str]]:
    """A clip's frames as one PNG, and how they lie on it: a browser shows any of them at any time,
    which it does not let a page do with an animation."""
    from rlalign.core.clips import decode_clip, lay_out
    from rlalign.core.media import UnreadablePicture, encode_image, to_image

    try:
        clip = decode_clip(content)
    except UnreadablePicture as error:
        raise Declined(404, "picture", "this clip cannot be read") from error
    sheet_CHW, columns = lay_out(clip.media_FCHW, WIDEST_SHEET)
    facts = {
        "x-frames": str(len(clip.media_FCHW)),
        "x-columns": str(columns),
        "x-rate": f"{clip.rate:.6g}",
    }
    return encode_image(to_image(sheet_CHW), "png", compress_level=1), facts
