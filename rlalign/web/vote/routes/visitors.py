"""Who asks, and how often they may: the signed cookie, the address, the administrator's token."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.requests import Request

from rlalign.web.token import knows_token
from rlalign.web.vote.desk import Declined
from rlalign.web.vote.rates import Rate, network_of


class TooFast(Declined):
    """Somebody asks more often than the page takes."""

    def __init__(self, seconds: float) -> None:
        super().__init__(429, "slow", "too many requests; wait a moment")
        self.seconds = seconds


@dataclass(frozen=True, kw_only=True)
class Visitors:
    """Everybody who asks a page."""

    admin: bytes | None = None
    """Digest of the administrator's token; None shows the results to everybody who can reach the
    page, which is for loopback."""
    by_person: Rate = field(default_factory=lambda: Rate(per_second=5, burst=60))
    by_address: Rate = field(default_factory=lambda: Rate(per_second=100, burst=600))

    def take_address(self, request: Request) -> None:
        """Counts a request of an address. Raises Declined."""
        host = request.client.host if request.client else "none"
        _take(self.by_address, network_of(host))

    def person(self, request: Request) -> str:
        """The person who asks, within both rates. Raises Declined."""
        self.take_address(request)
        annotator = person_of(request)
        if not annotator:
            raise Declined(401, "join", "join first")
        _take(self.by_person, annotator)
        return annotator

    def is_admin(self, request: Request) -> bool:
        """Whether it is the administrator who asks."""
        if self.admin is None:
            return True
        kept = request.session.get("admin", "")
        sent = [value.encode() for value in request.headers.getlist("authorization")]
        return kept == mark_of(self.admin) or knows_token(sent, self.admin)

    def ask_admin(self, request: Request) -> None:
        """Raises Declined for everybody else."""
        self.take_address(request)
        if not self.is_admin(request):
            raise Declined(401, "admin", "send the administrator's token as a bearer token")


def person_of(request: Request) -> str:
    """The person whom the signed cookie names, "" for nobody."""
    annotator = request.session.get("annotator", "")
    return annotator if isinstance(annotator, str) else ""


def mark_of(admin: bytes) -> str:
    """What the administrator's cookie holds."""
    return admin.hex()[:16]


def _take(rate: Rate, asker: str) -> None:
    seconds = rate.take(asker)
    if seconds:
        raise TooFast(seconds)
