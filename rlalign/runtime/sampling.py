"""Sampling on Ray: pieces of work on the rollout pool, rewards asked in the reward pools.

    driver: the method --pieces--> rollout pool --pictures--> reward pools
                ^------- values and costs -------'   (scores, or gradients of the pictures)

The driver decides and keeps the order; workers hold nothing of the run, so any of them may die: its
piece is given out again, and a question to a reward worker that died is asked again. Pieces are
fixed and noise is keyed, so the pictures are those of one process, bit for bit.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlalign.config import RuntimeSettings
from rlalign.core.locations import locate
from rlalign.core.records import Plan
from rlalign.engine import Cost, Engine, Work
from rlalign.engine.local import WorkResult
from rlalign.rewards.base import Reward
from rlalign.runtime import cluster
from rlalign.runtime.pool import Pool, PoolLost, UnitFailed, call_with_retries
from rlalign.runtime.reservation import bundle_of, sample_bundles
from rlalign.runtime.rewards import RewardActors
from rlalign.runtime.roles import ROLLOUT, reward_role
from rlalign.runtime.training.fleet import actor_class, actor_name
from rlalign.runtime.workers import PolicySource, PolicyWorker, RewardWorker
from rlalign.sampling import Sample, run_sample
from rlalign.sampling.compare import OnRecord


class RayEngine(Engine):
    """Pieces on a pool of actors, results in order."""

    def __init__(self, sample: Sample, actors: Sequence[Any]) -> None:
        self.rows = sample.rows
        self.cost = Cost()
        self.reason = ""
        self.restarts = 0
        self._runtime: RuntimeSettings = sample.runtime
        self._loop = asyncio.new_event_loop()
        self._actors = list(actors)
        self._pool = None
        self.path, self._shape = self._ask_first(sample.plan)

    def _ask_first(self, plan: Plan) -> tuple[Any, tuple[int, ...]]:
        return self._loop.run_until_complete(
            self._all([("the policy", lambda a: a.shape.remote(plan))])
        )[0]

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        return self._shape

    def map(self, works: Sequence[Work]) -> list[Any]:
        calls = [
            (f"piece {i + 1} of {len(works)}", lambda a, w=w: a.do.remote(w))
            for i, w in enumerate(works)
        ]
        done: list[WorkResult] = self._loop.run_until_complete(self._all(calls))
        self.cost = sum((d.cost for d in done), self.cost)
        self.reason = next((d.reason for d in reversed(done) if d.reason), self.reason)
        return [d.value for d in done]

    async def _all(self, calls: Sequence[tuple[str, Any]]) -> list[Any]:
        if self._pool is None:  # its queue belongs to the loop
            patience = self._runtime.recovery_seconds
            self._pool = Pool(ROLLOUT, self._actors, patience_seconds=patience, in_flight=2)
        pool = self._pool

        async def one(what: str, call: Any) -> Any:
            seconds = self._runtime.unit_timeout_seconds
            return await call_with_retries(
                what, pool, lambda actor: pool.answer(actor, call(actor), seconds), self._runtime
            )

        tasks = [asyncio.ensure_future(one(what, call)) for what, call in calls]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            self.restarts = pool.restarts

    def close(self) -> None:
        """Waits for nobody any more: a worker that is still starting is not needed."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


def create_actors(sample: Sample) -> tuple[list[Any], Mapping[str, Sequence[Any]]]:
    """(rollout actors, reward title -> its actors), owned by this process."""
    runtime = sample.runtime
    mark = uuid.uuid4().hex[:6]

    def reward_workers(reward: Reward) -> list[Any]:
        role = reward_role(reward.title)
        kind = actor_class(RewardWorker, bundle_of(role, runtime.reward))
        return [
            kind.options(name=actor_name(sample.name, mark, role, i)).remote(
                reward, runtime.reward_device, runtime.rollout.threads, f"{role} {i}"
            )
            for i in range(runtime.reward.workers)
        ]

    # reward workers exist first, since rollout workers call them
    asked = RewardActors(
        rewards=sample.rewards,
        held_out=sample.held_out,
        actors={r.title: reward_workers(r) for r in sample.rewards_for("evaluate")},
        runtime=runtime,
    )

    # found and located here: what names a run folder names that of the command
    source = PolicySource(
        model=replace(sample.model, recipe=locate(sample.model.recipe, "policy", here=False)),
        runtime=runtime,
        interpolation=sample.interpolation,
    )

    # each rollout worker prefers another reward worker
    kind = actor_class(PolicyWorker, bundle_of(ROLLOUT, runtime.rollout))
    workers = [
        kind.options(name=actor_name(sample.name, mark, ROLLOUT, i)).remote(
            replace(source, rewards=asked.prefer(i)), f"{ROLLOUT} {i}"
        )
        for i in range(runtime.rollout.workers)
    ]
    return workers, asked.actors


def sample_on_ray(
    sample: Sample, folder: Path, on_record: OnRecord, *, address: str | None
) -> dict[str, Any]:
    """On a local Ray, or the cluster at ``address``. Raises UserError on a user's mistake,
    RunFailed with a worker's error."""
    from rlalign.runtime.training.collect import RunFailed

    sample = locate(sample, here=address is None)
    dashboard = cluster.connect(
        sample_bundles(sample),
        sample.runtime.device,
        address,
        lambda note: on_record({"note": note}),
    )
    import ray

    try:
        if dashboard:
            on_record(
                {"note": f"Ray dashboard: {dashboard} (if it asks for a token: ray get-auth-token)"}
            )
        workers, scorers = create_actors(sample)
        engine = RayEngine(sample, workers)
        try:
            return run_sample(sample, folder, engine, on_record)
        finally:
            engine.close()
            for actor in [*workers, *(a for some in scorers.values() for a in some)]:
                ray.kill(actor)
    except (PoolLost, UnitFailed) as error:
        raise RunFailed(str(error)) from error
    finally:
        ray.shutdown()
