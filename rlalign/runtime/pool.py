"""A group of equal actors: who is idle, who died, who came back.

Health, replacement and growth are RLlib's FaultTolerantActorManager; which unit is where is the coordinator's ledger. Ray
restarts a killed actor by itself; this class only waits until it answers again, and says when it never will.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.exceptions
from ray.actor import ActorHandle
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

PROBE_SECONDS = 0.1


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
