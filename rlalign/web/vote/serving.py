"""The server of the page: its settings, and how it listens."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlalign.core.registry import UserError
from rlalign.web.listening import bound, certificate_files, listen, url_of
from rlalign.web.token import digest, is_loopback, read_token
from rlalign.web.vote.app import Page
from rlalign.web.vote.desk import Desk
from rlalign.web.vote.people import Secret
from rlalign.web.vote.rates import Rate
from rlalign.web.vote.routes.visitors import Visitors
from rlalign.web.vote.templates import Templates
from rlalign.web.vote.words import BLOCKED, read_blocked, read_languages

ADMIN_ENV = "RLALIGN_VOTE_ADMIN_TOKEN"
MAX_CONNECTIONS = 4096
"""A person holds one for events and up to five for the rest."""


class PageSettings(BaseModel):
    """How the page is served; ``server.KEY=VALUE`` on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address to listen on; the default is this machine only",
    )
    port: int = Field(default=8910, ge=0, le=65535, description="0 takes a free one")
    with_token: bool = Field(
        default=True, description="join by links and results by a token; off is for loopback"
    )
    admin_token_env: str = Field(
        default=ADMIN_ENV,
        pattern=r"^[A-Z_][A-Z0-9_]*$",
        description="environment variable that holds the administrator's token",
    )
    origin: str = Field(
        default="",
        pattern=r"^(https?://[^/\s]+)?$",
        description="where people find the page, where that is another address (a proxy's)",
    )
    certificate: str = Field(default="", description="certificate chain (PEM), for https")
    key: str = Field(default="", description="its private key (PEM)")
    behind_proxy: bool = Field(
        default=False, description="take people's addresses from a proxy on this machine"
    )
    languages: Path | None = Field(default=None, description="a folder of more language files")
    blocked_words: Path = Field(default=BLOCKED, description="words that no prompt may hold")
    person_per_second: float = Field(
        default=5.0, gt=0, description="requests of one person, pictures aside, in the long run"
    )
    address_per_second: float = Field(
        default=100.0, gt=0, description="requests of one address in the long run"
    )

    @model_validator(mode="after")
    def _open_pages_have_tokens(self) -> PageSettings:
        if not self.with_token and not is_loopback(self.host):
            raise UserError(
                f"server.with_token false is for a loopback address, got server.host {self.host}:"
                " anybody could vote there"
            )
        if self.behind_proxy and not self.origin:
            raise UserError(
                "server.origin must name the address of the proxy where server.behind_proxy is"
                " true, as https://vote.example.org"
            )
        return self


def make_page(desk: Desk, settings: PageSettings, secret: Secret, *, encrypted: bool) -> Page:
    """The page of a desk. Raises UserError on a user's mistake."""
    admin = None
    if settings.with_token:
        admin = digest(read_token(settings.admin_token_env, "vote"))
        os.environ.pop(settings.admin_token_env)
    return Page(
        desk=desk,
        secret=secret,
        templates=Templates(languages=read_languages(settings.languages)),
        blocked=read_blocked(settings.blocked_words),
        origin=settings.origin,
        loopback=is_loopback(settings.host),
        encrypted=encrypted or urlsplit(settings.origin).scheme == "https",
        with_token=settings.with_token,
        visitors=Visitors(
            admin=admin,
            by_person=Rate(
                per_second=settings.person_per_second, burst=12 * settings.person_per_second
            ),
            by_address=Rate(
                per_second=settings.address_per_second, burst=6 * settings.address_per_second
            ),
        ),
    )


def serve(
    desk: Desk,
    settings: PageSettings,
    secret: Secret,
    *,
    on_ready: Callable[[str], None],
    made: socket.socket | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM; ``on_ready`` gets the URL at which people find the page.

    ``made`` is a socket that was bound already. Raises UserError on a user's mistake.
    """
    certificate = certificate_files(settings.certificate, settings.key, "server")
    made = made or bound(settings.host, settings.port)
    try:
        page = make_page(desk, settings, secret, encrypted=bool(certificate))
        url = settings.origin or url_of(made, encrypted=bool(certificate))
        asyncio.run(
            listen(
                page.application(),
                made,
                on_ready=lambda: on_ready(url),
                on_end=page.end,
                limit_concurrency=MAX_CONNECTIONS,
                proxy_headers=settings.behind_proxy,
                **certificate,
            )
        )
    finally:
        made.close()
