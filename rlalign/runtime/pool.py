"""A group of equal actors that may grow, shrink and die: who is idle, who starts, who came back.

Health, replacement and growth are RLlib's FaultTolerantActorManager; which unit is where is the coordinator's ledger. Ray
restarts a killed actor by itself; this class only waits until it answers again, and says when it never will. An actor that
waits for resources is demand that a cluster's autoscaler sees, not an error: the others work meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.actor import ActorHandle
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from rlalign.config.settings import RuntimeSettings
from rlalign.registry import UserError

PROBE_SECONDS = 0.1


class UnitFailed(RuntimeError):
    """A unit failed on every attempt."""


class PoolLost(RuntimeError):
    """No actor of the pool will answer again; the message ends with the last actor's own error."""


class ObjectGone(RuntimeError):
    """What a call was given lay on a node, or belonged to a process, that is gone: it has to be made again."""


@dataclass(frozen=True, kw_only=True)
class PoolState:
    """How a pool stands: counts of actors, and how often one came back."""

    ready: int
    starting: int
    lost: int
    busy: int
    restarts: int


class Pool:
    """Actors of one role. ``acquire`` hands out an idle one; every one that is acquired is released or reported lost.

    Members have numbers that their owner gives. All of it belongs into one running event loop.
    """

    def __init__(
        self,
        role: str,
        actors: Sequence[ActorHandle] = (),
        *,
        patience_seconds: float,
        start_seconds: float = 600.0,
        in_flight: int = 1,
    ) -> None:
        """``in_flight`` 2 keeps the next call waiting at the actor, so that it need not wait for the way back."""
        self.role, self._patience, self._start, self._in_flight = role, patience_seconds, start_seconds, in_flight
        self._manager = FaultTolerantActorManager()
        self._ids: dict[int, int] = {}
        """A member's number -> its id at the manager."""
        self._waiters: deque[asyncio.Future[int]] = deque()
        self._out: Counter[int] = Counter()
        """Id -> calls that it has."""
        self._waits: dict[int, asyncio.Task[None]] = {}
        self._never: dict[int, BaseException] = {}
        """Those that Ray will not start again."""
        self._overdue: dict[int, BaseException] = {}
        self._retiring: set[int] = set()
        self._started: set[int] = set()
        self._last: dict[ActorHandle, asyncio.Task[Any]] = {}
        """Actor -> the last call that it was given and has not answered."""
        self.restarts = 0
        self.adopt(dict(enumerate(actors)))

    # --- who belongs to it --------------------------------------------------------------------------------------------

    def adopt(self, members: Mapping[int, ActorHandle]) -> None:
        """These and no others belong to the pool from now on: new ones start, missing ones leave when their work is done."""
        for number in members.keys() - self._ids.keys():
            self._manager.add_actors([members[number]])
            actor_id = self._ids[number] = self._manager.actor_ids()[-1]
            self._manager.set_actor_state(actor_id, healthy=False)
            self._wait_for(actor_id, TimeoutError(f"it did not start in {self._start:g} s"), self._start)
        for number in self._ids.keys() - members.keys():
            self._retiring.add(self._ids[number])
            self._drop_if_drained(self._ids[number])

    def numbers(self) -> set[int]:
        """Members, and those that leave and still work."""
        return set(self._ids)

    def state(self) -> PoolState:
        """How many are ready, start, are lost; busy ones are ready too."""
        ids = set(self._ids.values())
        lost = self._never.keys() | self._overdue.keys() | (self._waits.keys() & self._started)
        return PoolState(
            ready=len(ids - self._waits.keys() - self._never.keys()),
            starting=len(self._waits.keys() - self._started - self._overdue.keys()),
            lost=len(lost),
            busy=sum(1 for i in ids if self._out[i]),
            restarts=self.restarts,
        )

    def _drop_if_drained(self, actor_id: int) -> None:
        if self._out[actor_id]:
            return
        if task := self._waits.pop(actor_id, None):
            task.cancel()
        self._manager.remove_actor(actor_id)
        self._ids = {n: i for n, i in self._ids.items() if i != actor_id}
        for known in (self._never, self._overdue):
            known.pop(actor_id, None)
        self._retiring.discard(actor_id)
        self._serve()

    # --- who works ----------------------------------------------------------------------------------------------------

    async def acquire(self) -> tuple[int, ActorHandle]:
        """The next idle actor, first come first served. Raises PoolLost when none is left that could become idle."""
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._serve()
        try:
            actor_id = await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:
                self.release(waiter.result())
            raise
        return actor_id, self._manager.actors()[actor_id]

    def _serve(self) -> None:
        """Gives the least busy actors to those who have waited longest; tells all of them when none will ever be free."""
        if lost := self._lost_for_good():
            while self._waiters:
                waiter = self._waiters.popleft()
                if not waiter.done():
                    waiter.set_exception(PoolLost(lost))
        while self._waiters:
            free = [i for i in self._manager.healthy_actor_ids() if self._out[i] < self._in_flight]
            free = [i for i in free if i not in self._retiring]
            if self._waiters[0].done():
                self._waiters.popleft()
            elif not free:
                return
            else:
                actor_id = min(free, key=lambda i: (self._out[i], i))
                self._out[actor_id] += 1
                self._waiters.popleft().set_result(actor_id)

    def release(self, actor_id: int) -> None:
        """The actor is idle again."""
        self._out[actor_id] -= 1
        if actor_id in self._retiring:
            self._drop_if_drained(actor_id)
        self._serve()

    def lost(self, actor_id: int, error: BaseException) -> None:
        """The actor died under a call: waits in the background until it answers again."""
        if actor_id not in self._retiring and self._manager.is_actor_healthy(actor_id):
            self._manager.set_actor_state(actor_id, healthy=False)
            self._wait_for(actor_id, error, self._patience)
        self.release(actor_id)

    async def answer(self, actor: ActorHandle, ref: ray.ObjectRef, seconds: float) -> Any:
        """The answer to a call that an actor was given just now; TimeoutError when the actor works on it for longer.

        An actor does one call after another, so a call that waits behind another one has not begun. A caller that goes away
        leaves the call at the actor, and so its time running: those behind it still wait for it.
        """
        mine = asyncio.ensure_future(_timed(ref, self._last.get(actor), seconds))
        self._last[actor] = mine
        mine.add_done_callback(lambda done: self._answered(actor, done))
        return await asyncio.shield(mine)

    def _answered(self, actor: ActorHandle, call: asyncio.Task[Any]) -> None:
        if self._last.get(actor) is call:
            del self._last[actor]
        if not call.cancelled():
            call.exception()  # its caller may have gone away

    def _wait_for(self, actor_id: int, error: BaseException, patience: float) -> None:
        self._waits[actor_id] = asyncio.ensure_future(self._until_it_answers(actor_id, error, patience))

    async def _until_it_answers(self, actor_id: int, error: BaseException, patience: float) -> None:
        deadline = time.monotonic() + patience
        while True:
            found = await self._answers(actor_id)
            if found is True:
                break
            if isinstance(found, ray.exceptions.ActorDiedError):  # its constructor failed: Ray will not try again
                self._never[actor_id] = found
                del self._waits[actor_id]
                self._serve()
                return
            if time.monotonic() > deadline:
                self._overdue[actor_id] = error  # still asked: a node may come back
                self._serve()
            await asyncio.sleep(PROBE_SECONDS)
        self.restarts += actor_id in self._started
        self._started.add(actor_id)
        self._overdue.pop(actor_id, None)
        self._manager.set_actor_state(actor_id, healthy=True)
        del self._waits[actor_id]
        self._serve()

    async def _answers(self, actor_id: int) -> bool | BaseException:
        try:
            pong: Any = self._manager.actors()[actor_id].ping.remote()
            async with asyncio.timeout(10.0):
                await pong
            return True
        except (ray.exceptions.RayActorError, TimeoutError) as error:
            return error

    def _lost_for_good(self) -> str:
        """What to say when no actor will answer again; empty while one may."""
        hopeless = self._never.keys() | self._overdue.keys()
        if not self._ids or len(hopeless) < len(self._ids):
            return ""
        last = list({**self._overdue, **self._never}.values())[-1]
        return f"no {self.role} worker is left ({len(hopeless)} died for good); the last one said: {last}"


async def _timed(ref: ray.ObjectRef, before: asyncio.Task[Any] | None, seconds: float) -> Any:
    """The object; TimeoutError when it takes longer than ``seconds`` after the call before it was over."""
    if before is not None and not before.done():
        await asyncio.wait([before])
    async with asyncio.timeout(seconds):
        return await ref


async def tried(
    what: str,
    pool: Pool,
    call: Callable[[ActorHandle], Awaitable[Any]],
    runtime: RuntimeSettings,
    again: Callable[[], None] = lambda: None,
) -> Any:
    """The call on one actor after another until it succeeds, ``max_attempts`` times at most; then UnitFailed.

    A user's mistake is raised as it is, at once; ObjectGone where what the call was given is no more. An actor that hangs is
    killed and comes back fresh. ``again`` is told of every try after the first.
    """
    last = ""
    for attempt in range(runtime.max_attempts):
        if attempt:
            again()
        actor_id, actor = await pool.acquire()
        try:
            answer = await call(actor)
        except ray.exceptions.RayActorError as error:
            pool.lost(actor_id, error)
            last = f"its process died at work: {error}"
        except ray.exceptions.RayTaskError as error:  # before TimeoutError: a task's error is also of its cause's class
            pool.release(actor_id)
            if isinstance(error.cause, UserError):
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
        f"{what} failed on {runtime.max_attempts} attempts (runtime.max_attempts); the last one said:\n{last}"
    )
