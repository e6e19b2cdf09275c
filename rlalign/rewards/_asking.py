"""Asking a server over HTTP with patience: what the rewards that are computed elsewhere share."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import urlsplit

from rlalign.core.registry import UserError
from rlalign.web.token import is_loopback

if TYPE_CHECKING:
    import requests

    from rlalign.web.client import Client

Got = TypeVar("Got")
Clock = Callable[[], float]

FIRST_WAIT_SECONDS = 0.25
LONGEST_WAIT_SECONDS = 10.0


class TryLater(Exception):
    """A failure that may pass: what the server did, as the rest of a sentence, and how long it asks
    to be left alone."""

    def __init__(self, what: str, after_seconds: float = 0.0) -> None:
        super().__init__(what)
        self.after_seconds = after_seconds


class ConnectionLost(TryLater):
    """The same where the connection cannot be used again."""


class OutOfPatience(Exception):
    """A server that was asked until patience was at its end: what it did, as the rest of a
    sentence."""


def ask_patiently(
    once: Callable[[], Got],
    patience_seconds: float,
    clock: Clock = time.monotonic,
    longest_wait_seconds: float = LONGEST_WAIT_SECONDS,
) -> Got:
    """What ``once`` gives, asked again after 0.25 s, 0.5 s, ... while it raises TryLater.

    Waits as long as the server asks for, ``longest_wait_seconds`` at most. Raises OutOfPatience.
    """
    start = clock()
    tries = 0
    wait = FIRST_WAIT_SECONDS
    # so that workers that failed together do not come back together
    jitter = random.Random()
    while True:
        tries += 1
        try:
            return once()
        except TryLater as error:
            # while there is patience: twice the wait each time, or what the server asks for
            left = patience_seconds - (clock() - start)
            if left > 0:
                pause = max(
                    jitter.uniform(0.5, 1.0) * wait,
                    min(error.after_seconds, longest_wait_seconds),
                )
                time.sleep(min(pause, left))
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
                continue
            raise OutOfPatience(
                f"{error}, {tries} times in {clock() - start:.0f} seconds (patience_seconds)"
            ) from error


class Answer(NamedTuple):
    """What a server said."""

    status: int
    body: bytes
    after_seconds: float
    """How long it asks to be left alone."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """How a server is asked, and what is too much of an answer."""

    url: str
    """The whole address, with its path."""
    timeout_seconds: float
    max_bytes: int
    kind: str
    """What should listen there, for messages: "a reward server"."""
    clock: Clock = time.monotonic


def post(client: Client, question: Question, body: bytes) -> Answer:
    """The answer to a POST, whatever its status.

    Raises TryLater for what may pass: no connection, one that breaks, no answer in time. Raises
    UserError for a certificate that is not trusted, a compressed answer, or an endless one.
    """
    import requests

    # of a body that is read as it comes; requests does not wrap it
    from urllib3.exceptions import HTTPError

    deadline = question.clock() + question.timeout_seconds
    try:
        with client.post(question.url, data=body, stream=True) as found:
            said = _read(found, question, deadline)
            after = found.headers.get("Retry-After", "")
            return Answer(found.status_code, said, float(after) if after.isdigit() else 0.0)
    # what may pass is tried again, the rest is for the user to mend
    except requests.exceptions.SSLError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UserError(
                f"{question.url}: its certificate is not trusted; name who signed it in ca_file"
            ) from error
        raise TryLater(f"broke off the encrypted connection ({type(error).__name__})") from error
    except (requests.Timeout, TimeoutError) as error:
        raise TryLater(
            f"did not answer within {question.timeout_seconds:g} s (timeout_seconds)"
        ) from error
    except requests.exceptions.InvalidURL as error:
        raise UserError(f"{question.url} is no address ({error})") from error
    except (
        requests.ConnectionError,
        requests.exceptions.ChunkedEncodingError,
        HTTPError,
        OSError,
    ) as error:
        raise ConnectionLost(f"does not answer ({type(error).__name__})") from error


def _read(found: requests.Response, question: Question, deadline: float) -> bytes:
    """The answer's body. Raises UserError for a compressed or an endless one, TimeoutError for one
    that drips."""
    if found.headers.get("Content-Encoding", "identity") != "identity":
        raise UserError(f"{found.url}: the answer must not be compressed; is it {question.kind}?")
    said = bytearray()
    while piece := found.raw.read1(65536, decode_content=False):
        said += piece
        if len(said) > question.max_bytes:
            raise UserError(
                f"{found.url}: the answer is larger than {question.max_bytes:,} bytes; is it"
                f" {question.kind}?"
            )
        if question.clock() > deadline:
            raise TimeoutError
    return bytes(said)


def plain_address(url: str, example: str) -> str:
    """A URL without a slash at its end. Raises ValueError for what is none, or hides a secret."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"must be a URL such as {example}") from error
    if parts.username or parts.password or parts.query or parts.fragment:
        # not a rule that begins with "must": such an error would show the value, and there may
        # be a secret in it
        raise ValueError(
            "a URL with a user, a password, a query or a fragment; secrets go into token_env's"
            " variable"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"must be a URL such as {example}")
    return url.rstrip("/")


def refuse_open_network(url: str) -> None:
    """Raises ValueError for plain http to another machine."""
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ValueError(
            "url must be https for another machine, or the network sees the token;"
            " allow_plain_http: true permits it"
        )
