"""The page itself, and joining.

GET /  the page        POST /join  a person joins
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from rlalign.web.vote import messages
from rlalign.web.vote.desk import Declined, Desk
from rlalign.web.vote.people import Secret
from rlalign.web.vote.routes.answers import body_of, html, reader_of
from rlalign.web.vote.routes.visitors import Visitors, person_of
from rlalign.web.vote.templates import Templates
from rlalign.web.vote.words import Blocked


@dataclass(frozen=True, kw_only=True)
class PeopleRoutes:
    """How a person comes to the page."""

    desk: Desk
    secret: Secret
    visitors: Visitors
    templates: Templates
    blocked: Blocked
    with_token: bool
    """Whether joining needs a join link."""

    def routes(self) -> list[BaseRoute]:
        return [Route("/", self._index), Route("/join", self._join, methods=["POST"])]

    async def _index(self, request: Request) -> Response:
        self.visitors.take_address(request)
        about = self.desk.about
        page = self.templates.index(about, reader_of(request), with_token=self.with_token)
        return html(page)

    async def _join(self, request: Request) -> Response:
        self.visitors.take_address(request)
        token, name, consent = messages.read_join(await body_of(request))

        # who has joined already stays who he is, unless a link says otherwise
        known = person_of(request)
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
