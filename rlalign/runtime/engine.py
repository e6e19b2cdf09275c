"""Work on pools of actors: pieces for policy workers, questions about samples for reward workers.

    do(piece)        --> a worker of the rollout pool  --> parts, each fetched by who needs it
    score, gradient  --> a worker of each reward's pool

Three use it: a run's coordinator (units, under weights that travel once), the driver of a sampling
(``RayEngine``), and a policy worker whose piece asks for scores (rewards.py). All try again in the
same way: a call whose worker dies, hangs or fails goes to another one, ``max_attempts`` times at
most, and a piece whose result is lost before it was used is made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import ray
import ray.exceptions
import torch
from ray.actor import ActorHandle

from rlalign.config import RuntimeSettings
from rlalign.core.records import Plan, Unit
from rlalign.engine import Cost, Engine, Work, WorkResult
from rlalign.engine.pieces import Describe, Description
from rlalign.runtime.joint import JointCalls, Question
from rlalign.runtime.pool import ObjectGone, Pool, call_with_retries
from rlalign.runtime.roles import ROLLOUT, Role, reward_role
from rlalign.runtime.weights import Rows, WeightsRef, publish

Used = TypeVar("Used")

SEATS = 2
"""Pieces that a policy worker has at a time: one asks the policy, the other gets ready, waits for a
score or is handed over."""


class RewardAnswer(NamedTuple):
    """What one reward says of samples."""

    score_B: np.ndarray
    """(B,) raw scores, float32."""
    seconds: float
    reason: str = ""
    """What the scorer last said where it failed and that was let pass."""


class Pools(Mapping[Role, Pool]):
    """Role -> pool, and the work that goes through them. All of it belongs into one event loop."""

    def __init__(
        self,
        runtime: RuntimeSettings,
        roles: Iterable[Role],
        *,
        again: Callable[[Role], None] = lambda role: None,
        units_per_call: Mapping[str, int] | None = None,
        seats: int = SEATS,
    ) -> None:
        """``again`` is told of every try after the first. ``units_per_call``: reward title -> units
        that may be scored in one call; 1 where it is not there. ``seats``: pieces that a policy
        worker is given at a time."""
        self._runtime = runtime
        self._again = again
        self._pools = {
            role: Pool(
                role,
                start_seconds=runtime.start_seconds,
                # so many for each process of a worker
                in_flight=seats * runtime.rollout.shard if role == ROLLOUT else 1,
            )
            for role in roles
        }
        self._joint = {
            title: JointCalls(self._pools[role], runtime, units, partial(again, role))
            for title, units in (units_per_call or {}).items()
            if units > 1 and (role := reward_role(title)) in self._pools
        }
        self._holds: dict[ActorHandle, tuple[str, int]] = {}
        """Policy worker -> tag of the weights it was last sent: they travel once, not with every
        piece."""

    def __getitem__(self, role: Role) -> Pool:
        return self._pools[role]

    def __iter__(self) -> Iterator[Role]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)

    async def adopt(self, members: Mapping[Role, Mapping[int, ActorHandle]]) -> None:
        """Role -> number -> actor: who belongs to the pools from now on."""
        for role, pool in self._pools.items():
            pool.adopt(members[role])

    async def begun(self) -> None:
        """Waits until one of each pool is ready. Raises what ``Pool.acquire`` raises where none
        ever will be."""
        for pool in self._pools.values():
            number, _ = await pool.acquire()
            pool.release(number)

    # --- pieces of work --------------------------------------------------------------------------

    async def do(
        self,
        what: str,
        work: Work,
        use: Callable[[Sequence[ray.ObjectRef], WorkResult], Awaitable[Used]],
        weights: WeightsRef | None = None,
    ) -> Used:
        """Has a piece done and its result used; where that is lost in between, both once more.

        ``use`` gets the parts of the value, as references, and the result without its value. It
        raises ObjectGone for a part that is lost. ``what`` names the piece in messages.
        """
        attempt = 1
        while True:
            parts, done = await self._done(what, work, weights)
            try:
                return await use(parts, done)
            except ObjectGone:
                self._again(ROLLOUT)
                if attempt == self._runtime.max_attempts:
                    raise
                attempt += 1

    async def _done(
        self, what: str, work: Work, weights: WeightsRef | None
    ) -> tuple[Sequence[ray.ObjectRef], WorkResult]:
        pool = self._pools[ROLLOUT]
        tag = weights.tag if weights is not None else None

        async def ask(actor: ActorHandle, *given: Any) -> tuple[Sequence[ray.ObjectRef], Any]:
            method: Any = actor.do.options(num_returns=work.parts + 1)
            *parts, facts = method.remote(work, tag, *given)
            return parts, await pool.answer(actor, facts, self._runtime.unit_timeout_seconds)

        async def call(actor: ActorHandle) -> tuple[Sequence[ray.ObjectRef], Any]:
            if weights is None:
                return await ask(actor)

            # calls of one actor are carried out in order; one that was restarted meanwhile says
            # that it has no weights
            given = () if self._holds.get(actor) == tag else weights.manifests
            self._holds[actor] = weights.tag
            parts, facts = await ask(actor, *given)
            return (parts, facts) if facts is not None else await ask(actor, *weights.manifests)

        parts, (spent, reason) = await self._call(ROLLOUT, what, call)
        return parts, WorkResult(None, Cost(**spent), reason)

    # --- questions about samples -----------------------------------------------------------------

    async def score(
        self,
        titles: Iterable[str],
        samples: ray.ObjectRef,
        prompts: Sequence[str],
        *,
        unit: str = "",
        drop: bool = False,
        weights: WeightsRef | None = None,
    ) -> dict[str, RewardAnswer]:
        """Reward title -> what it says of samples (space -> array), each asked at the same time as
        the others.

        ``unit`` names the samples in messages. With ``drop`` a failing score is missing, whatever
        its ``on_error``. ``weights`` are those of the reward whose title is their kind.
        """

        async def ask(title: str) -> tuple[str, RewardAnswer]:
            own = weights is not None and weights.tag[0] == title
            given = (weights.tag, *weights.manifests) if weights is not None and own else ()

            def begin(actor: ActorHandle) -> ray.ObjectRef:
                return actor.score.remote(samples, prompts, unit, drop, *given)

            # with others that wait, where the reward has it so; by itself where that fails
            found = None
            if title in self._joint:
                question = Question(
                    samples=samples, prompts=prompts, unit=unit, drop=drop, given=given
                )
                found = await self._joint[title].ask(question)
            return title, RewardAnswer(*found or await self._ask_reward(title, begin, unit))

        asked = [ask(title) for title in titles]
        if len(asked) == 1:
            return dict([await asked[0]])
        return dict(await asyncio.gather(*asked))

    async def gradient(
        self, title: str, samples_B: np.ndarray, prompts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(raw scores (B,), d score / d samples) of what one reward sees, in floats."""
        return await self._ask_reward(
            title, lambda actor: actor.gradient.remote(samples_B, prompts)
        )

    async def _ask_reward(
        self, title: str, begin: Callable[[ActorHandle], ray.ObjectRef], unit: str = ""
    ) -> Any:
        role = reward_role(title)
        pool = self._pools[role]

        def call(actor: ActorHandle) -> Awaitable[Any]:
            return pool.answer(actor, begin(actor), self._runtime.unit_timeout_seconds)

        what = f"unit {unit}" if unit else "a piece of work"
        return await self._call(role, f"{role} of {what}", call)

    async def _call(
        self, role: Role, what: str, call: Callable[[ActorHandle], Awaitable[Any]]
    ) -> Any:
        return await call_with_retries(
            what, self._pools[role], call, self._runtime, lambda: self._again(role)
        )


class RayEngine(Engine):
    """Pieces on a pool of policy workers, under the weights that each has loaded or was sent."""

    def __init__(
        self,
        runtime: RuntimeSettings,
        members: Mapping[Role, Sequence[ActorHandle]],
        unit: Unit,
        *,
        rows: int,
        seats: int = SEATS,
    ) -> None:
        """Waits until a worker of each role is loaded, so that no piece waits for a reward, and
        asks what the policy is to the plan of ``unit``. ``seats`` are as in ``Pools``."""
        self.rows = rows
        self.cost = Cost()
        self.reason = ""
        self._unit = unit
        self._weights: WeightsRef | None = None
        self._loop = asyncio.new_event_loop()
        self._pools = Pools(runtime, members, seats=seats)
        self._shapes: dict[Plan, tuple[int, ...]] = {}
        numbered = {role: dict(enumerate(actors)) for role, actors in members.items()}
        try:
            self._wait(self._pools.adopt(numbered))
            self._wait(self._pools.begun())
            policy = self._describe(unit.plan)
        except BaseException:
            self.close()
            raise
        self.path = policy.path
        self.dtype = policy.dtype

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        if plan not in self._shapes:
            self._describe(plan)
        return self._shapes[plan]

    def _describe(self, plan: Plan) -> Description:
        found: Description = self.perform([Describe(unit=replace(self._unit, plan=plan))])[0].value
        self._shapes[plan] = found.latent_shape
        return found

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Has further pieces done under these weights; each worker gets them once."""
        version = self._weights.tag[1] + 1 if self._weights is not None else 1
        manifest = publish(Rows.of(weights))
        self._weights = WeightsRef(tag=("policy", version), manifests=(manifest,))

    def perform(self, works: Sequence[Work]) -> list[WorkResult]:
        return self._wait(self._all(works))

    async def _all(self, works: Sequence[Work]) -> list[WorkResult]:
        names = [f"piece {number} of {len(works)}" for number in range(1, len(works) + 1)]
        tasks = [
            asyncio.ensure_future(self._pools.do(name, work, _fetch, self._weights))
            for name, work in zip(names, works, strict=True)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def _wait(self, answer: Awaitable[Used]) -> Used:
        return self._loop.run_until_complete(answer)

    def close(self) -> None:
        """Waits for nobody any more: a worker that is still starting is not needed."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


async def _fetch(parts: Sequence[ray.ObjectRef], done: WorkResult) -> WorkResult:
    """The result with its value. Raises ObjectGone where that lay on a node that is gone."""
    try:
        values = [await part for part in parts]
    except ray.exceptions.ObjectLostError as error:
        raise ObjectGone(str(error)) from error
    return done._replace(value=values[0] if len(values) == 1 else tuple(values))
