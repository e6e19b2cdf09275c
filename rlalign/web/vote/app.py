"""The page as an application: the routes of ``routes/`` behind the guard and a signed cookie.

    GET /health  title and open streams        GET /static/FILE  scripts and styles

A person is who the signed cookie says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from rlalign.web.listening import Application
from rlalign.web.vote.desk import Desk
from rlalign.web.vote.guard import Guard
from rlalign.web.vote.people import Secret
from rlalign.web.vote.routes.answers import HANDLERS
from rlalign.web.vote.routes.ballots import BallotRoutes
from rlalign.web.vote.routes.events import EventRoutes
from rlalign.web.vote.routes.people import PeopleRoutes
from rlalign.web.vote.routes.results import ResultRoutes
from rlalign.web.vote.routes.visitors import Visitors
from rlalign.web.vote.templates import STATIC, Templates
from rlalign.web.vote.words import Blocked

COOKIE = "rlalign-vote"
COOKIE_SECONDS = 60 * 24 * 3600


@dataclass(kw_only=True)
class Page:
    """The application's parts; ``application()`` is what a server serves."""

    desk: Desk
    secret: Secret
    templates: Templates
    blocked: Blocked
    visitors: Visitors
    origin: str = ""
    loopback: bool = True
    encrypted: bool = False
    with_token: bool = False
    """Whether joining needs a join link."""
    _events: EventRoutes = field(init=False)

    def __post_init__(self) -> None:
        self._events = EventRoutes(desk=self.desk, visitors=self.visitors)

    def application(self) -> Application:
        """The ASGI application, with all that stands before it."""
        sessions = Middleware(
            SessionMiddleware,
            secret_key=self.secret.text,
            session_cookie=COOKIE,
            max_age=COOKIE_SECONDS,
            same_site="strict",
            https_only=self.encrypted,
        )
        application = Starlette(
            routes=self._routes(), middleware=[sessions], exception_handlers=HANDLERS
        )
        return Guard(application=application, origin=self.origin, loopback=self.loopback)

    def end(self) -> None:
        """Ends the event streams, which would not end by themselves."""
        self._events.end()

    def _routes(self) -> list[BaseRoute]:
        known = {"desk": self.desk, "secret": self.secret, "visitors": self.visitors}
        people = PeopleRoutes(
            **known, templates=self.templates, blocked=self.blocked, with_token=self.with_token
        )
        ballots = BallotRoutes(**known, blocked=self.blocked)
        results = ResultRoutes(**known, templates=self.templates)
        return [
            *people.routes(),
            *ballots.routes(),
            *self._events.routes(),
            *results.routes(),
            Route("/health", self._health),
            Route("/favicon.ico", _icon),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]

    async def _health(self, request: Request) -> Response:
        self.visitors.take_address(request)
        return JSONResponse({"page": self.desk.about.title, "streams": self._events.count})


async def _icon(_: Request) -> Response:
    return RedirectResponse("/static/icon.svg")
