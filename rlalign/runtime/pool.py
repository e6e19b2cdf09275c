"""A group of equal actors that may grow, shrink and die: who is idle, who starts, who came back.

Every actor that was handed over is a member in one of five states:

    starting --answers--> ready --lost, under a call--> away --answers--> ready
        |                   |                             |
        |                   +--not wanted any more, and at work--> leaving --released--> (no member)
        |                                                 |
        +--Ray will not start it again--> gone <----------+

    starting, away   asked until they answer. One whose time is over is asked on, and counts as
                     lost meanwhile: its node may come back
    gone             never asked again
    (no member)      where one that does not work goes at once when it is not wanted any more

Which unit is where is the coordinator's ledger. Ray restarts a killed actor by itself; this class
only waits until it answers again, and says when it never will. An actor that waits for resources is
demand that a cluster's autoscaler sees, not an error: the others work meanwhile.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
from ray.actor import ActorHandle

from rlalign.config import RuntimeSettings
from rlalign.core.registry import UserError
from rlalign.runtime.idle import IdleMembers
from rlalign.runtime.roles import Role

PING_SECONDS = 10.0
PROBE_SECONDS = 0.1


class UnitFailed(RuntimeError):
    """A unit failed on every attempt."""


class PoolLost(RuntimeError):
    """No actor of the pool will answer again; the message ends with the last actor's own error."""


class ObjectGone(RuntimeError):
    """What a call was given lay on a node, or belonged to a process, that is gone: it has to be
    made again."""


@dataclass(frozen=True, kw_only=True)
class PoolState:
    """How a pool stands: counts of actors, and how often one came back."""

    ready: int
    starting: int
    lost: int
    busy: int
    restarts: int


class State(enum.Enum):
    """Of a member; the diagram on top says what leads from one to another."""

    STARTING = "starting"
    READY = "ready"
    AWAY = "away"
    GONE = "gone"
    LEAVING = "leaving"


@dataclass(kw_only=True, eq=False)
class Member:
    """One actor of a pool."""

    number: int
    """Its owner's, of whom it tells two actors apart."""
    actor: ActorHandle
    state: State = State.STARTING
    calls: int = 0
    """That it was given and has not been released from."""
    unanswered: set[asyncio.Task[Any]] = field(default_factory=set)
    """The calls that it was given and has not answered."""
    question: asyncio.Task[None] | None = None
    """Asks it, while it starts or is away, until it answers."""
    error: BaseException | None = None
    """Why it is lost: what it died of, or that its time is over."""

    @property
    def is_lost(self) -> bool:
        """Whether nobody counts on it any more: it is gone, or its time is over."""
        return self.error is not None


class Pool:
    """Actors of one role. ``acquire`` hands out an idle one; every one that is acquired is released
    or reported lost.

    All of it belongs into one running event loop.
    """

    def __init__(
        self,
        role: Role,
        actors: Sequence[ActorHandle] = (),
        *,
        start_seconds: float,
        in_flight: int = 1,
    ) -> None:
        """``start_seconds`` is how long an actor may take to answer, at first and after it died.
        ``in_flight`` 2 keeps the next call at the actor, which gets ready for it and need not wait
        for the way back."""
        self.role = role
        self.restarts = 0
        self._start = start_seconds
        self._idle = IdleMembers(in_flight)
        self._members: dict[int, Member] = {}
        self._waiters: deque[asyncio.Future[Member]] = deque()
        self.adopt(dict(enumerate(actors)))

    # --- who belongs to it -----------------------------------------------------------------------

    def adopt(self, actors: Mapping[int, ActorHandle]) -> None:
        """These and no others belong to the pool from now on: new ones start, missing ones leave
        when their work is done."""
        late = TimeoutError("nothing yet: it waits for a place, or still loads")
        for number in sorted(actors.keys() - self._members.keys()):
            member = Member(number=number, actor=actors[number])
            self._members[number] = member
            self._ask(member, late)
        for number in self._members.keys() - actors.keys():
            self._dismiss(self._members[number])

    def numbers(self) -> set[int]:
        """Members, and those that leave and still work."""
        return set(self._members)

    def state(self) -> PoolState:
        """How many are ready, start, are lost; busy ones, and those that leave, are ready too."""
        members = self._members.values()
        count = Counter(member.state for member in members)
        late = sum(member.state == State.STARTING and member.is_lost for member in members)
        return PoolState(
            ready=count[State.READY] + count[State.LEAVING],
            starting=count[State.STARTING] - late,
            lost=count[State.AWAY] + count[State.GONE] + late,
            busy=sum(member.calls > 0 for member in members),
            restarts=self.restarts,
        )

    def _dismiss(self, member: Member) -> None:
        """Takes one out that is not wanted any more, as soon as it has no calls."""
        if member.question is not None:
            member.question.cancel()
            member.question = None
        member.state = State.LEAVING
        member.error = None
        if not member.calls:
            del self._members[member.number]
            self._serve()

    # --- who works -------------------------------------------------------------------------------

    async def acquire(self) -> tuple[int, ActorHandle]:
        """The next idle actor and its number, first come first served. Raises PoolLost when none is
        left that could become idle.

        Where actors refused to begin for a user's mistake, it is that UserError.
        """
        waiter: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._serve()
        try:
            member = await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:
                self.release(waiter.result().number)
            raise
        return member.number, member.actor

    def _serve(self) -> None:
        """Gives the least busy actors to those who have waited longest; tells all of them when none
        will ever be free."""
        loss = self._loss()
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.done():
                number = self._idle.least_busy(self._calls_of)
                if loss is not None:
                    waiter.set_exception(loss)
                elif number is not None:
                    member = self._members[number]
                    member.calls += 1
                    self._idle.offer(number, member.calls)
                    waiter.set_result(member)
                else:
                    return
            self._waiters.popleft()

    def _calls_of(self, number: int) -> int | None:
        """A member's calls; None of one that is not ready."""
        member = self._members.get(number)
        if member is None or member.state != State.READY:
            return None
        return member.calls

    def release(self, number: int) -> None:
        """The actor is idle again."""
        member = self._members[number]
        member.calls -= 1
        if member.state == State.LEAVING:
            self._dismiss(member)
        self._idle.offer(number, member.calls)
        self._serve()

    def lost(self, number: int, error: BaseException) -> bool:
        """The actor died under a call: waits in the background until it answers again. Returns
        whether it was taken away: it was leaving, or its node was given notice."""
        member = self._members[number]
        taken = member.state == State.LEAVING or getattr(error, "preempted", False)
        if member.state == State.READY:
            member.state = State.AWAY
            self._ask(member, error)
        self.release(number)
        return taken

    async def answer(self, actor: ActorHandle, ref: ray.ObjectRef, seconds: float) -> Any:
        """The answer to a call that an actor was given just now; TimeoutError when the actor works
        on it for longer.

        An actor does one call after another, so a call that waits behind others has not begun; it
        may be answered before them where they wait for something else. A caller that goes away
        leaves the call at the actor, and so its time running: those behind it still wait for it.
        """
        member = next(one for one in self._members.values() if one.actor is actor)
        call = asyncio.ensure_future(_await_in_turn(ref, set(member.unanswered), seconds))
        member.unanswered.add(call)
        call.add_done_callback(lambda done: self._note_answer(member, done))
        return await asyncio.shield(call)

    def _note_answer(self, member: Member, call: asyncio.Task[Any]) -> None:
        member.unanswered.discard(call)
        if not call.cancelled():
            call.exception()  # its caller may have gone away

    # --- who comes back --------------------------------------------------------------------------

    def _ask(self, member: Member, error: BaseException) -> None:
        """Asks one that starts or is away until it answers. ``error`` says why it is lost when it
        has not in time."""
        member.question = asyncio.ensure_future(self._ask_until(member, error))

    async def _ask_until(self, member: Member, error: BaseException) -> None:
        began = asked = time.monotonic()
        while (refusal := await _ping(member.actor)) is not None:
            # its constructor failed: Ray will not try again, and a user's mistake would be the same
            # one
            if isinstance(refusal, ray.exceptions.ActorDiedError | UserError):
                member.state = State.GONE
                member.error = refusal
                member.question = None
                self._serve()
                return
            # what was asked in time says nothing of now: this loop may have rested since
            if asked - began > self._start:
                member.error = error  # still asked: a node may come back
                self._serve()
            await asyncio.sleep(PROBE_SECONDS)
            asked = time.monotonic()

        # the actor answers: it counts as restarted where its process was lost
        self.restarts += member.state == State.AWAY
        member.state = State.READY
        member.error = None
        member.question = None
        self._idle.offer(member.number, member.calls)
        self._serve()

    def _loss(self) -> PoolLost | UserError | None:
        """What to say when no actor will answer again; None while one may."""
        members = self._members.values()
        if not members or not all(member.is_lost for member in members):
            return None
        errors = [m.error for m in sorted(members, key=lambda m: m.state == State.GONE)]
        refusal = next((error for error in errors if isinstance(error, UserError)), None)
        if refusal is not None:
            return refusal

        # what became of each, and the setting that gives it more time
        late = f"in {self._start:g} s: raise runtime.start_seconds"
        fates = {
            State.GONE: "died for good",
            State.STARTING: f"did not start {late}",
            State.AWAY: f"did not come back {late}",
        }
        count = Counter(member.state for member in members)
        said = ", ".join(f"{count[state]} {fate}" for state, fate in fates.items() if count[state])
        return PoolLost(f"no {self.role} worker is left ({said}); the last one said: {errors[-1]}")


async def _ping(actor: ActorHandle) -> BaseException | None:
    """Why an actor does not answer; None where it does. What is wrong with us is raised."""
    pong = asyncio.ensure_future(actor.ping.remote())
    try:
        # an answer that came while the loop rested counts, however long ago it was asked for
        await asyncio.wait([pong], timeout=PING_SECONDS)
        if not pong.done():
            return TimeoutError(f"no answer in {PING_SECONDS:g} s")
        pong.result()
    except ray.exceptions.RayActorError as error:
        return error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            return error.cause
        raise
    finally:
        pong.cancel()  # where nobody waits for it any more
    return None


async def _await_in_turn(ref: ray.ObjectRef, before: set[asyncio.Task[Any]], seconds: float) -> Any:
    """The object; TimeoutError when it takes longer than ``seconds`` after the calls before it were
    over."""
    answer: Any = ref
    if before:
        answer = asyncio.ensure_future(answer)
    while before and not answer.done():
        await asyncio.wait({answer, *before}, return_when=asyncio.FIRST_COMPLETED)
        before = {call for call in before if not call.done()}
    async with asyncio.timeout(seconds):
        return await answer


async def call_with_retries(
    what: str,
    pool: Pool,
    call: Callable[[ActorHandle], Awaitable[Any]],
    runtime: RuntimeSettings,
    again: Callable[[], None] = lambda: None,
) -> Any:
    """The call on one actor after another until it succeeds, ``max_attempts`` times at most; then
    UnitFailed.

    A user's mistake is raised as it is, at once, as is what the call itself had tried often enough
    (UnitFailed, PoolLost); ObjectGone where what the call was given is no
    more. An actor that hangs is killed and comes back fresh. What ends with a worker that leaves,
    or with a node that was taken away with notice, is no failed try. ``again`` is told of every try
    after the first.
    """
    last = ""
    left = runtime.max_attempts
    while left:
        if last:
            again()
        left -= 1
        actor_id, actor = await pool.acquire()
        try:
            answer = await call(actor)
        except ray.exceptions.RayActorError as error:
            left += pool.lost(actor_id, error)
            last = f"its process died at work: {error}"
        # before TimeoutError: a task's error is also of its cause's class
        except ray.exceptions.RayTaskError as error:
            pool.release(actor_id)
            if isinstance(error.cause, UserError | UnitFailed | PoolLost):
                raise error.cause from None
            if isinstance(error.cause, ray.exceptions.ObjectLostError):
                raise ObjectGone(str(error.cause)) from error
            last = str(error)
        except ray.exceptions.ObjectLostError as error:
            pool.release(actor_id)
            raise ObjectGone(str(error)) from error
        except TimeoutError:
            ray.kill(actor, no_restart=False)  # hangs: a fresh process takes its place
            pool.lost(actor_id, TimeoutError(what))
            last = f"no answer in {runtime.unit_timeout_seconds:g} s"
        except BaseException:
            pool.release(actor_id)
            raise
        else:
            pool.release(actor_id)
            return answer
    raise UnitFailed(
        f"{what} failed on {runtime.max_attempts} attempts (runtime.max_attempts); the last one"
        f" said:\n{last}"
    )
