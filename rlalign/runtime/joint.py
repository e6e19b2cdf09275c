"""Questions to one reward's pool that wait for an idle worker, asked in one call.

    unit A waits --+                             +--> A's scores
    unit B waits --+--> the next idle worker ----+--> B's scores
    unit C comes later                           (C goes with the next call)

A call that fails says nothing of its units: each is asked again by itself, with the attempts that
every question has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from rlalign.config import RuntimeSettings
from rlalign.core.registry import UserError
from rlalign.runtime.pool import ObjectGone, Pool, UnitFailed, call_with_retries

Answer = tuple[Any, ...]
"""What ``RewardWorker.score`` gives: scores, seconds, what the scorer said when it failed."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """Samples of a unit that one reward is asked about."""

    samples: ray.ObjectRef
    prompts: Sequence[str]
    unit: str
    drop: bool
    given: tuple[Any, ...] = ()
    """The tag of the weights that are meant, and where they are; empty for those that are there."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """Questions of one kind may be asked in one call."""
        return (self.drop, self.unit.partition("/")[0], *self.given[:1])


@dataclass(kw_only=True, eq=False)
class _Place:
    """A question's place among those that wait."""

    question: Question
    answer: asyncio.Future[Answer | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """None where the call failed that it went with."""

    def settle(self, answer: Answer | None) -> None:
        """Answers it, once."""
        if not self.answer.done():
            self.answer.set_result(answer)


class JointCalls:
    """The questions to one pool, up to ``units`` of them in a call."""

    def __init__(
        self, pool: Pool, runtime: RuntimeSettings, units: int, again: Callable[[], None]
    ) -> None:
        """``again`` is told of every call of several units that failed."""
        self._pool = pool
        self._once = runtime.model_copy(update={"max_attempts": 1})
        self._units = units
        self._again = again
        self._waiting: list[_Place] = []

    async def ask(self, question: Question) -> Answer | None:
        """(scores, seconds, what the scorer said when it failed); None where it is to be asked by
        itself. Raises PoolLost where nobody will answer."""
        place = _Place(question=question)
        self._waiting.append(place)

        async def call(actor: ActorHandle) -> None:
            if place in self._waiting:
                await self._put(actor, self._take(place))

        try:
            await call_with_retries(f"units with {question.unit}", self._pool, call, self._once)
        except (UnitFailed, UserError, ObjectGone):
            self._again()
            place.settle(None)
        finally:
            if place in self._waiting:
                self._waiting.remove(place)
        return await place.answer

    def _take(self, first: _Place) -> list[_Place]:
        """A question and those that go with it, which wait no more."""
        others = [p for p in self._waiting if p.question.kind == first.question.kind]
        taken = [first, *(p for p in others if p is not first)][: self._units]
        self._waiting = [place for place in self._waiting if place not in taken]
        return taken

    async def _put(self, actor: ActorHandle, places: Sequence[_Place]) -> None:
        """Has one worker score several units' samples."""
        asked = [place.question for place in places]
        ref = actor.score_units.remote(
            [one.prompts for one in asked],
            [one.unit for one in asked],
            asked[0].drop,
            asked[0].given,
            *(one.samples for one in asked),
        )
        try:
            answers = await self._pool.answer(actor, ref, self._once.unit_timeout_seconds)
            for place, answer in zip(places, answers, strict=True):
                place.settle(answer)
        finally:
            for place in places:
                place.settle(None)
