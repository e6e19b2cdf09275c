"""The numbers, and the administrator who sees them.

GET  /results  the page of the numbers     GET /results.json, /export
POST /admin    the administrator's token
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from rlalign.core.files import dump_json
from rlalign.web.token import digest
from rlalign.web.vote.desk import Declined, Desk
from rlalign.web.vote.people import Secret
from rlalign.web.vote.routes.answers import body_of, html, reader_of
from rlalign.web.vote.routes.visitors import Visitors, mark_of
from rlalign.web.vote.templates import Templates

ADMIN = "administrator"
"""Whose keys the pictures on /results have; no id of a person is a word."""


@dataclass(frozen=True, kw_only=True)
class ResultRoutes:
    """What the administrator asks."""

    desk: Desk
    secret: Secret
    visitors: Visitors
    templates: Templates

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/results", self._results),
            Route("/results.json", self._results_json),
            Route("/export", self._export),
            Route("/admin", self._admin, methods=["POST"]),
        ]

    async def _results(self, request: Request) -> Response:
        self.visitors.take_address(request)
        if not self.visitors.is_admin(request):
            return html(self.templates.admin(reader_of(request)), status=401)
        found = await run_in_threadpool(self.desk.results)
        about = self.desk.about
        key_of = partial(self.secret.key_of, ADMIN)
        return html(self.templates.results(about, found, reader_of(request), key_of))

    async def _results_json(self, request: Request) -> Response:
        self.visitors.ask_admin(request)
        results = await run_in_threadpool(self.desk.results)
        return Response(dump_json(results), media_type="application/json")

    async def _export(self, request: Request) -> Response:
        self.visitors.ask_admin(request)
        lines: Iterator[str] = self.desk.export()
        return StreamingResponse(
            (f"{line}\n" for line in lines),
            media_type="application/x-ndjson",
            headers={"content-disposition": 'attachment; filename="votes.jsonl"'},
        )

    async def _admin(self, request: Request) -> Response:
        self.visitors.take_address(request)
        sent = parse_qs((await body_of(request)).decode("utf-8", "replace"), max_num_fields=4)
        token = sent.get("token", [""])[0]
        admin = self.visitors.admin
        if admin is None or not hmac.compare_digest(digest(token), admin):
            raise Declined(403, "admin", "this is not the administrator's token")
        request.session["admin"] = mark_of(admin)
        return RedirectResponse("/results", status_code=303)
