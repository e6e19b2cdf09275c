"""Which unit is where: one asyncio actor that holds references and small facts only, never arrays of pictures.

    learner --order(units, weights ref)--> coordinator --produce--> rollout pool --media ref--> reward pools
       ^                                       |
       +------ gather: refs and scores --------+

A unit whose worker dies is given out again, up to ``max_attempts`` times; then the run ends with the worker's own error.
Units belong to an *incarnation* of the learner: when a killed learner comes back, what it had ordered is dropped and ordered
again, so that no unit is used twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import ray.exceptions
from ray.actor import ActorHandle

from rlalign.config import Run
from rlalign.records import Unit
from rlalign.registry import UserError
from rlalign.runtime.pool import Pool, PoolLost, UnitFailed, awaited, tried


@dataclass(kw_only=True)
class Failure:
    """Why a run cannot go on."""

    message: str
    is_users: bool


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """What the coordinator knows of a finished unit."""

    raw: Mapping[str, np.ndarray]
    """Reward title -> (B,) float32."""
    seconds: Mapping[str, float]
    refs: tuple[ray.ObjectRef, ray.ObjectRef]
    """Trajectory and media."""


@dataclass(kw_only=True)
class _Ledger:
    """What one incarnation of the learner has ordered."""

    name: str
    tickets: dict[int, list[asyncio.Task[UnitResult]]] = field(default_factory=dict)
    ordered: asyncio.Condition = field(default_factory=asyncio.Condition)
    gathered: dict[int, int] = field(default_factory=dict)
    """Ticket -> learners that have it."""


class Coordinator:
    """The actor (created by the driver, zero CPUs)."""

    def __init__(self, run: Run, rollouts: Sequence[ActorHandle], rewards: Mapping[str, Sequence[ActorHandle]]) -> None:
        self._run = run
        patience = run.runtime.recovery_seconds
        self._rollouts = Pool("rollout", rollouts, patience_seconds=patience, in_flight=2)
        self._rewards = {t: Pool(f"reward {t}", a, patience_seconds=patience) for t, a in rewards.items()}
        self._titles = {s: [r.title for r in run.rewards_for(s)] for s in ("train", "evaluate")}
        self._ledger = _Ledger(name="")
        self._records: list[dict[str, Any]] = []
        self._news = asyncio.Condition()
        self._failure: Failure | None = None
        self._handled_bytes, self._handled_samples = 0, 0
        self._gauges: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"coordinator of {self._run.name}"

    # --- the learner's side -------------------------------------------------------------------------------------------

    async def begin(self, incarnation: str) -> Failure | None:
        """A learner has started: what an earlier one had ordered is dropped. Answers with the failure of a run that is over."""
        for task in (t for tasks in self._ledger.tickets.values() for t in tasks):
            task.cancel()
        self._ledger = _Ledger(name=incarnation)
        return self._failure

    async def order(
        self,
        incarnation: str,
        ticket: int,
        units: Sequence[Unit],
        tag: tuple[str, int],
        weights: Sequence[ray.ObjectRef],
    ) -> None:
        """Starts units under the weights in ``weights[0]`` (wrapped, so that the reference travels and not the arrays)."""
        ledger = self._ledger
        if incarnation != ledger.name:
            return
        self._count(units)
        ledger.tickets[ticket] = [asyncio.ensure_future(self._unit(u, tag, weights[0])) for u in units]
        self._handled_samples += sum(len(u.prompts) for u in units)
        async with ledger.ordered:
            ledger.ordered.notify_all()

    async def gather(self, incarnation: str, ticket: int, learners: int) -> list[UnitResult] | Failure:
        """A ticket's results in unit order, once for each of the ``learners`` processes; or why there will be none."""
        ledger = self._ledger
        if incarnation != ledger.name:
            return Failure(message="this learner has been replaced", is_users=False)
        async with ledger.ordered:
            await ledger.ordered.wait_for(lambda: ticket in ledger.tickets)
        try:
            results = await asyncio.gather(*(asyncio.shield(t) for t in ledger.tickets[ticket]))
        except (UserError, PoolLost, UnitFailed) as error:
            self._failure = self._failure or Failure(message=str(error), is_users=isinstance(error, UserError))
            return self._failure
        except asyncio.CancelledError:
            return Failure(message="this learner has been replaced", is_users=False)
        ledger.gathered[ticket] = ledger.gathered.get(ticket, 0) + 1
        if ledger.gathered[ticket] == learners:
            del ledger.tickets[ticket]
        return list(results)

    def facts(self) -> dict[str, float]:
        """Counters for the metrics line."""
        return {
            "restarts/rollout": self._rollouts.restarts,
            "restarts/reward": sum(p.restarts for p in self._rewards.values()),
            "driver_bytes_per_sample": round(self._handled_bytes / max(self._handled_samples, 1), 1),
        }

    async def record(self, line: dict[str, Any]) -> None:
        """A metrics line or an evaluation, for the driver's screen and Ray's metrics."""
        self._records.append(line)
        self._publish(line)
        async with self._news:
            self._news.notify_all()

    async def abort(self, failure: Failure) -> None:
        """The learner cannot go on."""
        self._failure = self._failure or failure

    # --- the driver's side --------------------------------------------------------------------------------------------

    async def records(self, since: int, timeout_seconds: float) -> list[dict[str, Any]]:
        """Records from number ``since`` on; waits for one up to the timeout."""
        with contextlib.suppress(TimeoutError):
            async with self._news:
                await asyncio.wait_for(self._news.wait_for(lambda: len(self._records) > since), timeout_seconds)
        return self._records[since:]

    async def failure(self) -> Failure | None:
        """Why the run ended, if it failed."""
        return self._failure

    # --- one unit -----------------------------------------------------------------------------------------------------

    async def _unit(self, unit: Unit, tag: tuple[str, int], weights: ray.ObjectRef) -> UnitResult:
        (trajectory, media), rollout_seconds = await tried(
            f"unit {unit.key}",
            self._rollouts,
            lambda actor: self._produced(actor, unit, tag, weights),
            self._run.runtime,
        )
        titles = self._titles[unit.key.stream]
        scored = await asyncio.gather(
            *(
                tried(
                    f"reward {title} of unit {unit.key}",
                    self._rewards[title],
                    lambda actor: self._awaited(actor.score.remote(media, unit.prompts)),
                    self._run.runtime,
                )
                for title in titles
            )
        )
        result = UnitResult(
            raw={title: values for title, (values, _) in zip(titles, scored, strict=True)},
            seconds={"rollout": rollout_seconds, "reward": sum(s for _, s in scored)},
            refs=(trajectory, media),
        )
        self._count(result.raw)
        return result

    async def _produced(self, actor: ActorHandle, unit: Unit, tag: tuple[str, int], weights: ray.ObjectRef) -> Any:
        refs: list[ray.ObjectRef] = list(actor.produce.remote(unit, tag, weights))
        trajectory, media, facts = refs
        answer = await self._awaited(facts)
        self._count(answer)
        return (trajectory, media), answer["seconds"]

    async def _awaited(self, ref: ray.ObjectRef) -> Any:
        return await awaited(ref, self._run.runtime)

    def _count(self, message: Any) -> None:
        self._handled_bytes += len(pickle.dumps(message))

    def _publish(self, line: Mapping[str, Any]) -> None:
        """The same figures as Ray gauges: ``ray_rlalign_reward_total_mean`` and so on."""
        from ray.util.metrics import Gauge

        for key, value in line.items():
            if isinstance(value, int | float) and value == value:
                name = "rlalign_" + "".join(c if c.isalnum() else "_" for c in key)
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, description=f"rlalign metric {key}", tag_keys=("run",))
                    self._gauges[name].set_default_tags({"run": self._run.name})
                self._gauges[name].set(value)


def failure_of(error: BaseException) -> Failure:
    """An exception as what the driver shows: a user's mistake in one message, a fault of ours with its traceback."""
    if isinstance(error, UserError):
        return Failure(message=str(error), is_users=True)
    return Failure(message="".join(traceback.format_exception(error)), is_users=False)
