"""A reward that is computed elsewhere and asked for over HTTP."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from rlalign.core.locations import LocalPath
from rlalign.core.media import as_uint8
from rlalign.core.registry import UserError
from rlalign.rewards.base import Reward, Scorer
from rlalign.web.protocol import MAX_ANSWER_BYTES, MAX_SAMPLES, read_error, read_scores, requests_of
from rlalign.web.token import TOKEN_ENV, is_loopback, read_token

if TYPE_CHECKING:
    import requests

    from rlalign.web.client import Client

FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 10.0
RETRIED = (408, 429, 502, 503, 504)
"""Statuses of a server that is overloaded, restarting, or behind a proxy that finds nobody."""


class Http(Reward):
    """A reward on another machine or in another process, such as ``rlalign serve-reward`` serves.

    Pictures travel as PNG, so the scores are those of the same reward in this process. A server
    that is down or overloaded is waited for; what happens after ``patience_seconds`` is up to
    ``on_error``. No gradient passes.

    Source: the protocol in docs/http-rewards.md; the score is the server's own.
    """

    differentiable: ClassVar[bool] = False

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
    timeout_seconds: float = Field(
        default=60.0, gt=0, le=3600, description="how long one answer may take"
    )
    patience_seconds: float = Field(
        default=300.0,
        ge=0,
        le=86400,
        description="how long a server that is down or overloaded is asked again",
    )
    batch: int = Field(
        default=64, ge=1, le=MAX_SAMPLES, description="samples in a request, at most"
    )
    ca_file: LocalPath = Field(
        default="", description="certificates (PEM) to trust for https in place of the usual ones"
    )
    allow_plain_http: bool = Field(
        default=False,
        description="http to another machine, where the network sees the token and the pictures",
    )

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            host = parts.hostname
            _ = parts.port
        except ValueError as error:
            raise ValueError("must be a URL such as https://scores.example.org:8900") from error
        if parts.username or parts.password or parts.query or parts.fragment:
            # not a rule that begins with "must": such an error would show the value, and there may
            # be a secret in it
            raise ValueError(
                "a URL with a user, a password, a query or a fragment; secrets go into token_env's"
                " variable"
            )
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("must be a URL such as https://scores.example.org:8900")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _hides_the_token(self) -> Http:
        parts = urlsplit(self.url)
        if (
            parts.scheme == "http"
            and not is_loopback(parts.hostname or "")
            and not self.allow_plain_http
        ):
            raise ValueError(
                "url must be https for another machine, or the network sees the token;"
                " allow_plain_http: true permits it"
            )
        return self

    def load(self, device: str) -> Scorer:
        """The scorer; it asks nothing yet. Raises UserError where the token or the certificates are
        missing."""
        place = f"rewards.{self.title}"
        if self.ca_file and not Path(self.ca_file).is_file():
            raise UserError(f"{place}.ca_file: no such file {self.ca_file!r}")
        return _HttpScorer(
            self, read_token(self.token_env, f"{place}.token_env") if self.token_env else ""
        )


class RewardUnavailable(RuntimeError):
    """A request that has no scores: the server is down, too slow, or its reward has failed."""


@dataclass
class _HttpScorer:
    """Asks in requests of at most ``batch`` samples, one after the other, over one kept
    connection."""

    reward: Http
    _token: str = field(repr=False)
    _session: Client | None = field(default=None, repr=False)
    _clock: Callable[[], float] = field(default=time.monotonic, repr=False)

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
        start = self._clock()
        tries = 0
        wait = FIRST_WAIT_SECONDS
        # so that workers that failed together do not come back together
        jitter = random.Random()
        while True:
            tries += 1
            try:
                return self._once(count, body)
            except _TryLater as error:
                # while there is patience: twice the wait each time, or what the server asks for
                left = self.reward.patience_seconds - (self._clock() - start)
                if left > 0:
                    pause = max(
                        jitter.uniform(0.5, 1.0) * wait,
                        min(error.after_seconds, LONGEST_WAIT_SECONDS),
                    )
                    time.sleep(min(pause, left))
                    wait = min(2 * wait, LONGEST_WAIT_SECONDS)
                    continue
                # it is at its end
                said = (
                    f"{self.reward.url} {error}, {tries} times in {self._clock() - start:.0f}"
                    " seconds (patience_seconds)"
                )
                if self.reward.on_error == "raise":
                    raise UserError(
                        f"{said}; is it running? With on_error: drop, or a number, a run goes on"
                    ) from error
                return [math.nan] * count

    def _once(self, count: int, body: bytes) -> list[float]:
        import requests

        # of a body that is read as it comes; requests does not wrap it
        from urllib3.exceptions import HTTPError

        url = f"{self.reward.url}/score"
        deadline = self._clock() + self.reward.timeout_seconds
        # ask, and read no more of the answer than there may be
        try:
            with self._connected().post(
                url,
                data=body,
                stream=True,
            ) as found:
                said = self._read(found, deadline)
                status = found.status_code
                after = found.headers.get("Retry-After", "")
        # what may pass is tried again, the rest is for the user to mend
        except requests.exceptions.SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise UserError(
                    f"{url}: its certificate is not trusted; name who signed it in ca_file"
                ) from error
            raise _TryLater(
                f"broke off the encrypted connection ({type(error).__name__})"
            ) from error
        except (requests.Timeout, TimeoutError) as error:
            raise _TryLater(
                f"did not answer within {self.reward.timeout_seconds:g} s (timeout_seconds)"
            ) from error
        except requests.exceptions.InvalidURL as error:
            raise UserError(f"{self.reward.url} is no address ({error})") from error
        except (
            requests.ConnectionError,
            requests.exceptions.ChunkedEncodingError,
            HTTPError,
            OSError,
        ) as error:
            self._session = None
            raise _TryLater(f"does not answer ({type(error).__name__})") from error
        return self._scores(url, status, said, after, count)

    def _scores(self, url: str, status: int, said: bytes, after: str, count: int) -> list[float]:
        # an answer that may be another one later
        why = read_error(said)
        says = f"{url} answered {status}" + (f": {why}" if why else "")
        if status in RETRIED:
            raise _TryLater(
                f"answered {status}" + (f" ({why})" if why else ""),
                float(after) if after.isdigit() else 0.0,
            )
        if status == 200:
            try:
                return read_scores(said, count)
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

    def _read(self, found: requests.Response, deadline: float) -> bytes:
        """The answer's body. Raises UserError for a compressed or an endless one, TimeoutError for
        one that drips."""
        if found.headers.get("Content-Encoding", "identity") != "identity":
            raise UserError(
                f"{found.url}: the answer must not be compressed; is it a reward server?"
            )
        said = bytearray()
        while piece := found.raw.read1(65536, decode_content=False):
            said += piece
            if len(said) > MAX_ANSWER_BYTES:
                raise UserError(
                    f"{found.url}: the answer is larger than {MAX_ANSWER_BYTES:,} bytes; is it a"
                    " reward server?"
                )
            if self._clock() > deadline:
                raise TimeoutError
        return bytes(said)

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


class _TryLater(Exception):
    """A failure that may pass: what the server did, as the rest of a sentence, and how long it asks
    to be left alone."""

    def __init__(self, what: str, after_seconds: float = 0.0) -> None:
        super().__init__(what)
        self.after_seconds = after_seconds
