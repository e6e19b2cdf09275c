"""The learner's side of the coordinator: units go out as small records, trajectories come in from shared memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from rlalign.config import Run
from rlalign.records import Scored, Unit, Weights
from rlalign.registry import UserError
from rlalign.rewards.base import total
from rlalign.runtime.coordinator import Failure


class RunFailed(RuntimeError):
    """The run cannot go on, for a reason that is not the user's; the message carries the worker's own error."""


class RemoteCollect:
    """rlalign.loop's Collect over a cluster; one per learner process, of which the main one orders."""

    def __init__(self, run: Run, coordinator: ActorHandle, *, incarnation: str, is_main: bool, learners: int) -> None:
        self._run, self._coordinator, self._incarnation = run, coordinator, incarnation
        self._is_main, self._learners = is_main, learners
        self._published: tuple[tuple[str, int], ray.ObjectRef] | None = None
        self._tickets: dict[int, tuple[Sequence[Unit], int]] = {}
        self._next = 0
        runtime = run.runtime
        self._patience = runtime.max_attempts * (runtime.unit_timeout_seconds + runtime.recovery_seconds)

    def order(self, units: Sequence[Unit], weights: Weights) -> int:
        self._next += 1
        self._tickets[self._next] = (units, weights.version)
        if self._is_main:
            if self._published is None or self._published[0] != weights.tag:
                arrays = {n: t.cpu().numpy() for n, t in weights.tensors.items()}
                self._published = (weights.tag, ray.put(arrays))
            self._ask(
                self._coordinator.order.remote(
                    self._incarnation, self._next, list(units), weights.tag, [self._published[1]]
                )
            )
        return self._next

    def gather(self, ticket: int) -> list[Scored]:
        units, version = self._tickets.pop(ticket)
        results = self._ask(self._coordinator.gather.remote(self._incarnation, ticket, self._learners))
        if isinstance(results, Failure):
            raise UserError(results.message) if results.is_users else RunFailed(results.message)
        fetched = ray.get([ref for r in results for ref in r.refs], timeout=self._patience)
        return [
            Scored(
                unit=unit,
                policy_version=version,
                raw=result.raw,
                total_B=total(self._run.rewards, result.raw),
                trajectory=fetched[2 * i],
                media_BFCHW=fetched[2 * i + 1],
                seconds=result.seconds,
            )
            for i, (unit, result) in enumerate(zip(units, results, strict=True))
        ]

    def facts(self) -> Mapping[str, float]:
        return self._ask(self._coordinator.facts.remote())

    def _ask(self, ref: ray.ObjectRef) -> Any:
        return ray.get(ref, timeout=self._patience)
