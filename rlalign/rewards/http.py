"""A reward that is computed elsewhere and asked for over HTTP."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import Field

from rlalign.core.media import as_uint8
from rlalign.core.registry import UserError
from rlalign.rewards._asking import (
    Answer,
    Clock,
    ConnectionLost,
    OutOfPatience,
    Question,
    TryLater,
    ask_patiently,
    post,
)
from rlalign.rewards._remote import RemoteReward
from rlalign.rewards.base import Scorer
from rlalign.web.protocol import MAX_ANSWER_BYTES, MAX_SAMPLES, read_error, read_scores, requests_of
from rlalign.web.token import TOKEN_ENV, read_token

if TYPE_CHECKING:
    from rlalign.web.client import Client

RETRIED = (408, 429, 502, 503, 504)
"""Statuses of a server that is overloaded, restarting, or behind a proxy that finds nobody."""


class Http(RemoteReward):
    """A reward on another machine or in another process, such as ``rlalign serve-reward`` serves.

    Pictures travel as PNG, so the scores are those of the same reward in this process. A server
    that is down or overloaded is waited for; what happens after ``patience_seconds`` is up to
    ``on_error``. No gradient passes.

    Source: the protocol in docs/http-rewards.md; the score is the server's own.
    """

    address: ClassVar[str] = "https://scores.example.org:8900"

    url: str = Field(
        default="http://127.0.0.1:8900",
        description="where the server listens; its default when left out",
    )
    token_env: str = Field(
        default=TOKEN_ENV,
        pattern=r"^([A-Z_][A-Z0-9_]*)?$",
        description=(
            "environment variable that holds the token where rewards are computed; empty: the"
            " server wants none"
        ),
    )
    batch: int = Field(
        default=64, ge=1, le=MAX_SAMPLES, description="samples in a request, at most"
    )

    def load(self, device: str) -> Scorer:
        """The scorer; it asks nothing yet. Raises UserError where the token or the certificates are
        missing."""
        self.refuse_missing_certificates()
        place = f"rewards.{self.title}.token_env"
        return _HttpScorer(self, read_token(self.token_env, place) if self.token_env else "")


class RewardUnavailable(RuntimeError):
    """A request that has no scores: the server is down, too slow, or its reward has failed."""


@dataclass
class _HttpScorer:
    """Asks in requests of at most ``batch`` samples, one after the other, over one kept
    connection."""

    reward: Http
    _token: str = field(repr=False)
    _session: Client | None = field(default=None, repr=False)
    _clock: Clock = field(default=time.monotonic, repr=False)

    def __call__(self, media_BFCHW: torch.Tensor, prompts: Sequence[str], /) -> torch.Tensor:
        media = as_uint8(media_BFCHW)
        scores: list[float] = []
        try:
            for count, body in requests_of(media, prompts, self.reward.batch):
                scores += self._patiently(count, body)
        except UserError as error:
            raise UserError(f"rewards.{self.reward.title}: {error}") from error
        return torch.from_numpy(np.array(scores, dtype=np.float32))

    def _patiently(self, count: int, body: bytes) -> list[float]:
        """The scores of one request, asked for until patience is at its end; NaN then, unless
        on_error raises."""
        try:
            return ask_patiently(
                lambda: self._once(count, body), self.reward.patience_seconds, self._clock
            )
        except OutOfPatience as error:
            if self.reward.on_error == "raise":
                raise UserError(
                    f"{self.reward.url} {error}; is it running? With on_error: drop, or a number, a"
                    " run goes on"
                ) from error
            return [math.nan] * count

    def _once(self, count: int, body: bytes) -> list[float]:
        question = Question(
            url=f"{self.reward.url}/score",
            timeout_seconds=self.reward.timeout_seconds,
            max_bytes=MAX_ANSWER_BYTES,
            kind="a reward server",
            clock=self._clock,
        )
        try:
            found = post(self._connected(), question, body)
        except ConnectionLost:
            self._session = None
            raise
        return self._scores(question.url, found, count)

    def _scores(self, url: str, found: Answer, count: int) -> list[float]:
        # an answer that may be another one later
        status = found.status
        why = read_error(found.body)
        says = f"{url} answered {status}" + (f": {why}" if why else "")
        if status in RETRIED:
            raise TryLater(f"answered {status}" + (f" ({why})" if why else ""), found.after_seconds)
        if status == 200:
            try:
                return read_scores(found.body, count)
            except ValueError as error:
                raise UserError(f"{url}: {error}; is it a reward server?") from error
        if status >= 500 and self.reward.on_error != "raise":
            # the policy asks again sample by sample
            raise RewardUnavailable(says)
        # what the user can do about any other answer
        hints = {
            401: f"the token in {self.reward.token_env or 'token_env'} is not the server's",
            404: "url is the address without /score",
            400: "where the prompts have records, an older server knows none of them",
            413: "lower batch",
        }
        hint = hints.get(status, "see the server's log" if status >= 500 else "")
        if 300 <= status < 400:
            hint = "it is a redirect, and the token goes to no other address; name that"
        raise UserError(says + (f"; {hint}" if hint else ""))

    def _connected(self) -> Client:
        from rlalign.web.client import Client

        if self._session is None:
            client = self._session = Client(
                self.reward.url, self._token, self.reward.timeout_seconds
            )
            client.headers.update(
                {"Content-Type": "application/json", "Accept-Encoding": "identity"}
            )
            client.verify = self.reward.ca_file or client.verify
        return self._session
