"""A judge that looks at a picture and answers a question: any server that speaks OpenAI's chat
protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from rlalign.core.locations import NamesFile
from rlalign.core.media import as_uint8
from rlalign.core.prompts import record_of
from rlalign.core.registry import UserError
from rlalign.rewards._asking import (
    Answer,
    ConnectionLost,
    OutOfPatience,
    Question,
    TryLater,
    ask_patiently,
    post,
)
from rlalign.rewards._judge_answers import (
    Reply,
    Unreadable,
    chance_of,
    error_in,
    mean_of,
    number_of,
    read_reply,
)
from rlalign.rewards._judge_ledger import BudgetSpent, Ledger
from rlalign.rewards._judge_questions import Asked, Questions
from rlalign.rewards._remote import RemoteReward
from rlalign.rewards.base import Scorer
from rlalign.web.protocol import png

logger = logging.getLogger(__name__)

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses of a server that is overloaded, restarting, or has stumbled."""
REFUSED = (400, 413, 415, 422)
"""Statuses of a question that this server will not answer, however often it is asked."""
LONGEST_PAUSE_SECONDS = 60.0
"""As long as a server's Retry-After is heeded at once."""
MAX_REPLY_BYTES = 4 * 2**20
TOP_LOGPROBS = 20
"""Likeliest tokens that are asked for: what vLLM gives by default, and others at most."""
_SHIPPED = r"\w*"


class VlmJudge(RemoteReward):
    """What a vision language model says of the picture: a mark, or how sure it is of yes.

    The server speaks OpenAI's chat protocol (vLLM, SGLang, a hosted one). ``answer`` number reads
    the mark after "Final Score:" and maps lowest..highest to 0..1; yes is the probability of yes
    against no as the first word; listed asks every question of the record's list and takes the mean
    probability of their answers, which is GenEval 2's Soft-TIFA. All frames of a clip go into one
    question. No gradient passes.

    Weights: whatever the server holds.

    Source: marks as UnifiedReward gives them, Wang 2025, arXiv:2503.05236; probability of yes: Lin
    2024, arXiv:2404.01291 (VQAScore); listed questions: Kamath 2025, arXiv:2512.16853 (GenEval 2).
    """

    address: ClassVar[str] = "https://api.example.org/v1"

    model: str = Field(min_length=1, description="its name at the server")
    url: str = Field(
        default="http://127.0.0.1:8000/v1",
        description="the server, to which /chat/completions is added",
    )
    answer: Literal["number", "yes", "listed"] = Field(
        default="number", description="what is read: a mark, or the probability of yes or of listed"
    )
    template: Annotated[str, NamesFile(never=_SHIPPED)] = Field(
        default="", description="a Jinja file, or the name of one that ships; empty: by answer"
    )
    lowest: float = Field(default=1.0, allow_inf_nan=False, description="mark that scores 0")
    highest: float = Field(default=5.0, allow_inf_nan=False, description="mark that scores 1")
    pattern: str = Field(
        default=r"(?i)final score\s*:?\s*\**\s*([-+]?\d+(?:\.\d+)?)",
        description="finds the mark: a regular expression with one group; the last match counts",
    )
    listed_in: str = Field(
        default="vqa_list", description="field of the record with [question, answer] pairs"
    )
    mean: Literal["arithmetic", "geometric"] = Field(
        default="arithmetic", description="over listed questions"
    )
    answer_tokens: int = Field(
        default=0, ge=0, description="tokens of an answer, at most; 0: 512 for a mark, else 4"
    )
    extra: dict[str, Any] = Field(
        default_factory=dict, description="more fields of the request; null takes one out"
    )
    concurrency: int = Field(default=8, ge=1, le=256, description="questions asked at a time")
    budget_requests: int = Field(
        default=0, ge=0, description="requests, at most, tries included; 0 is any number"
    )
    budget_tokens: int = Field(
        default=0, ge=0, description="tokens of questions and answers, at most; 0 is any number"
    )
    cache: Annotated[str, NamesFile(may_come=True)] = Field(
        default="", description="SQLite file that keeps answers and counts; empty: in memory"
    )

    @field_validator("url")
    @classmethod
    def _without_the_call(cls, url: str) -> str:
        return url.removesuffix("/chat/completions")

    @field_validator("pattern")
    @classmethod
    def _has_one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"must be a regular expression ({error})") from error
        if groups != 1:
            raise ValueError("must have one group, in parentheses, around the mark")
        return pattern

    @field_validator("extra")
    @classmethod
    def _leaves_the_question(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted({"messages", "model", "stream"} & set(extra)):
            raise ValueError(f"must not hold {taken[0]}, which is made of the other settings")
        return extra

    @model_validator(mode="after")
    def _settings_fit(self) -> VlmJudge:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest must be < highest, got {self.lowest:g} and {self.highest:g}")
        return self

    def load(self, device: str) -> Scorer:
        """The scorer; it asks nothing yet. Raises UserError where the key, the template or the
        certificates are missing."""
        self.refuse_missing_certificates()
        return _JudgeScorer(self, _read_key(self.token_env, f"rewards.{self.title}"))


def _read_key(variable: str, place: str) -> str:
    """The server's key, "" where it wants none."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"{place}.token_env: the environment variable {variable} must hold the server's key:"
            " printable ASCII characters without a space"
        )
    return key


class _Task(NamedTuple):
    """One question about one sample."""

    asked: Asked
    pictures: tuple[str, ...]
    """The frames, each a PNG in base64."""
    digest: str
    """Of their pixels."""


class _JudgeScorer:
    """Asks ``concurrency`` questions at a time; the same one once."""

    def __init__(self, reward: VlmJudge, key: str) -> None:
        self._reward = reward
        self._place = f"rewards.{reward.title}"
        self._key = key
        self._questions = Questions(reward.template, reward.answer, reward.listed_in, self._place)
        self._ledger = Ledger(
            reward.cache, reward.budget_requests, reward.budget_tokens, self._place
        )
        self._pattern = re.compile(reward.pattern)
        self._kept = threading.local()
        self._pool = ThreadPoolExecutor(reward.concurrency, "judge")
        self._warned = set[str]()

    def __call__(self, media_BFCHW: torch.Tensor, prompts: Sequence[str], /) -> torch.Tensor:
        # every question, before any is asked: a record that is wrong costs nothing
        scale = (self._reward.lowest, self._reward.highest)
        asked = [self._questions.of(p, record_of(p), scale) for p in prompts]
        media = as_uint8(media_BFCHW)
        tasks: list[list[_Task]] = []
        for some, (pictures, digest) in zip(asked, map(_encode, media), strict=True):
            tasks.append([_Task(one, pictures, digest) for one in some])
        # the same question about the same picture is asked once
        once = {(task.asked, task.digest): task for task in chain.from_iterable(tasks)}
        answers = dict(zip(once, self._pool.map(self._value, once.values()), strict=True))
        scores: list[float] = []
        for some in tasks:
            values = [answers[task.asked, task.digest] for task in some]
            scores.append(mean_of(values, self._reward.mean))
        return torch.tensor(scores, dtype=torch.float32)

    def _value(self, task: _Task) -> float:
        """What one answer means, 0 to 1; NaN where there is none, unless on_error raises."""
        request = self._request(task.asked.text)
        question = hashlib.sha256(
            json.dumps([self._reward.url, request, task.digest], sort_keys=True).encode()
        ).hexdigest()
        try:
            kept = self._ledger.find(question)
            if kept is not None:
                return self._meaning(Reply.of_kept(kept), task.asked)
            reply = ask_patiently(
                lambda: self._ask(_body(request, task)),
                self._reward.patience_seconds,
                time.monotonic,
                LONGEST_PAUSE_SECONDS,
            )
            value = self._meaning(reply, task.asked)
        except (OutOfPatience, BudgetSpent, Unreadable, _Declined) as error:
            return self._missing(str(error))
        # only what means something is kept: the rest is asked again by the next run
        self._ledger.keep(question, reply.kept())
        return value

    def _meaning(self, reply: Reply, asked: Asked) -> float:
        if self._reward.answer == "number":
            scale = (self._reward.lowest, self._reward.highest)
            return number_of(reply.text, self._pattern, scale)
        if reply.chances is None:
            raise UserError(
                f"{self._place}: {self._reward.url} gives no logprobs; take answer: number, or a"
                " server that gives them"
            )
        return chance_of(reply, asked)

    def _missing(self, what: str) -> float:
        said = f"{self._place}: {self._reward.url} {what}"
        if self._reward.on_error == "raise":
            raise UserError(f"{said}. With on_error: drop, or a number, a run goes on")
        if said not in self._warned and len(self._warned) < 10:
            self._warned.add(said)
            logger.warning("%s: the score is missing", said)
        return math.nan

    # --- one request -----------------------------------------------------------------------------

    def _request(self, text: str) -> dict[str, Any]:
        """The request without its pictures: all that the answer depends on beside them."""
        reward = self._reward
        made: dict[str, Any] = {"model": reward.model, "messages": text, "temperature": 0}
        made["max_tokens"] = reward.answer_tokens or (512 if reward.answer == "number" else 4)
        if reward.answer != "number":
            made |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return {name: v for name, v in {**made, **reward.extra}.items() if v is not None}

    def _ask(self, body: bytes) -> Reply:
        self._ledger.take_request()
        question = Question(
            url=f"{self._reward.url}/chat/completions",
            timeout_seconds=self._reward.timeout_seconds,
            max_bytes=MAX_REPLY_BYTES,
            kind="a chat server",
        )
        try:
            found = post(self._client(), question, body)
        except ConnectionLost:
            del self._kept.client
            raise
        except UserError as error:
            raise UserError(f"{self._place}: {error}") from error
        if found.status != 200:
            self._refuse(question.url, found)
        try:
            reply = read_reply(found.body)
        except ValueError as error:
            raise UserError(
                f"{self._place}: {question.url}: {error}; is it a chat server?"
            ) from error
        self._ledger.add_tokens(reply.tokens)
        return reply

    def _refuse(self, url: str, found: Answer) -> None:
        """Raises what a status other than 200 means."""
        status = found.status
        why, code = error_in(found.body)
        why = "".join(c for c in self._without_key(why) if c.isprintable())[:200]
        says = f"answered {status}" + (f" ({why})" if why else "")
        if status in RETRIED and code != "insufficient_quota":
            raise TryLater(says, found.after_seconds)
        if status in REFUSED:
            raise _Declined(says)
        # what the user can do about any other answer
        hint = {
            401: f"the key in {self._reward.token_env or 'token_env'} is not one of the server's",
            403: f"the key in {self._reward.token_env or 'token_env'} may not do this",
            404: f"url ends before /chat/completions, and model is {self._reward.model!r}",
            429: "the account has nothing left",
        }.get(status, "")
        if 300 <= status < 400:
            hint = "it is a redirect, and the key goes to no other address; name that"
        # a server may repeat a part of the key that it does not know
        says = f"answered {status}" if status in (401, 403) else says
        raise UserError(f"{self._place}: {url} {says}" + (f"; {hint}" if hint else ""))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _client(self) -> Any:
        """This thread's connection."""
        from rlalign.web.client import Client

        if not hasattr(self._kept, "client"):
            client = Client(self._reward.url, self._key, self._reward.timeout_seconds)
            client.headers.update(
                {"Content-Type": "application/json", "Accept-Encoding": "identity"}
            )
            client.verify = self._reward.ca_file or client.verify
            self._kept.client = client
        return self._kept.client


class _Declined(Exception):
    """A question that the server will not answer."""


def _encode(media_FCHW: np.ndarray) -> tuple[tuple[str, ...], str]:
    """(a PNG in base64 per frame, the hash of their pixels and size)."""
    digest = hashlib.sha256(repr(media_FCHW.shape).encode())
    digest.update(np.ascontiguousarray(media_FCHW).tobytes())
    pictures = tuple(base64.b64encode(png(frame)).decode() for frame in media_FCHW)
    return pictures, digest.hexdigest()


def _body(request: dict[str, Any], task: _Task) -> bytes:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        for picture in task.pictures
    ]
    parts.append({"type": "text", "text": request["messages"]})
    return json.dumps({**request, "messages": [{"role": "user", "content": parts}]}).encode()
