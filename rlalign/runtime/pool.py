"""A group of equal actors: who is idle, who died, who came back.

Health, replacement and growth are RLlib's FaultTolerantActorManager; which unit is where is the coordinator's ledger. Ray
restarts a killed actor by itself; this class only waits until it answers again, and says when it never will.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
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


class Pool:
    """Actors of one role. ``acquire`` hands out an idle one; every one that is acquired is released or reported lost."""

    def __init__(
        self, role: str, actors: Sequence[ActorHandle], *, patience_seconds: float, in_flight: int = 1
    ) -> None:
        """``in_flight`` 2 keeps the next call waiting at the actor, so that it need not wait for the way back."""
        self.role, self._patience = role, patience_seconds
        self._manager = FaultTolerantActorManager(list(actors))
        self._idle: asyncio.Queue[int] = asyncio.Queue()
        for actor_id in in_flight * self._manager.actor_ids():  # one after the other: the first calls go to all
            self._idle.put_nowait(actor_id)
        self._held_back: Counter[int] = Counter()
        self._recoveries: dict[int, asyncio.Task[None]] = {}
        self._gone: dict[int, BaseException] = {}
        self.restarts = 0

    def actors(self) -> Mapping[int, ActorHandle]:
        """Id -> actor."""
        return self._manager.actors()

    async def acquire(self) -> tuple[int, ActorHandle]:
        """The next idle actor. Raises PoolLost when none is left that could become idle."""
        while True:
            self._raise_if_lost()
            try:
                actor_id = await asyncio.wait_for(self._idle.get(), timeout=1.0)
            except TimeoutError:
                continue
            if self._manager.is_actor_healthy(actor_id):
                return actor_id, self._manager.actors()[actor_id]
            self._held_back[actor_id] += 1

    def release(self, actor_id: int) -> None:
        """The actor is idle again."""
        if self._manager.is_actor_healthy(actor_id):
            self._idle.put_nowait(actor_id)
        else:
            self._held_back[actor_id] += 1

    def lost(self, actor_id: int, error: BaseException) -> None:
        """The actor died under a call: waits in the background until it answers again."""
        self._held_back[actor_id] += 1
        if actor_id not in self._recoveries and actor_id not in self._gone:
            self._manager.set_actor_state(actor_id, healthy=False)
            self._recoveries[actor_id] = asyncio.ensure_future(self._recover(actor_id, error))

    async def _recover(self, actor_id: int, error: BaseException) -> None:
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            found = await self._answers(actor_id)
            if found is True:
                self.restarts += 1
                self._manager.set_actor_state(actor_id, healthy=True)
                del self._recoveries[actor_id]
                for _ in range(self._held_back.pop(actor_id, 0)):
                    self._idle.put_nowait(actor_id)
                return
            if isinstance(found, ray.exceptions.ActorDiedError):  # its constructor failed: Ray will not try again
                error = found
                break
            await asyncio.sleep(PROBE_SECONDS)
        self._gone[actor_id] = error
        del self._recoveries[actor_id]

    async def _answers(self, actor_id: int) -> bool | BaseException:
        try:
            await asyncio.wait_for(_future(self._manager.actors()[actor_id].ping.remote()), timeout=10.0)
            return True
        except (ray.exceptions.RayActorError, TimeoutError) as error:
            return error

    def _raise_if_lost(self) -> None:
        if len(self._gone) == len(self._manager.actors()):
            last = list(self._gone.values())[-1]
            raise PoolLost(
                f"no {self.role} worker is left ({len(self._gone)} died for good); the last one said: {last}"
            )


async def _future(ref: ray.ObjectRef) -> Any:
    return await ref


async def awaited(ref: ray.ObjectRef, runtime: RuntimeSettings) -> Any:
    """The object; TimeoutError when it takes longer than a unit may."""
    return await asyncio.wait_for(_future(ref), timeout=runtime.unit_timeout_seconds)


async def tried(what: str, pool: Pool, call: Callable[[ActorHandle], Awaitable[Any]], runtime: RuntimeSettings) -> Any:
    """The call on one actor after another until it succeeds, ``max_attempts`` times at most; then UnitFailed.

    A user's mistake is raised as it is, at once. An actor that hangs is killed and comes back fresh.
    """
    last = ""
    for _ in range(runtime.max_attempts):
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
            last = str(error)
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
