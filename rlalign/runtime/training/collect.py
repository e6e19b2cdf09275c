"""The learner's side of the coordinator: units go out as small records, trajectories come in from
shared memory.

A coordinator that dies takes its ledger and the references it owned with it. The learner begins
again with the new one and orders what it waits for once more: the same units under the same
weights, so the same samples. So it does with units whose samples lay on a node that is gone. With
several learner processes, which would have to agree on that, the group starts again from its
checkpoint instead.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
import ray.exceptions
import torch
from ray.actor import ActorHandle

from rlalign.config import Run
from rlalign.core.progress import Tell, tell_nobody
from rlalign.core.records import Scored, Unit, Weights
from rlalign.core.registry import UserError
from rlalign.networks.shares import are_shares, is_share, own_part, own_rows
from rlalign.rewards.base import total
from rlalign.runtime.training.coordinator import Failure
from rlalign.runtime.training.nodes import draining_nodes
from rlalign.runtime.training.production import UnitResult
from rlalign.runtime.weights import Rows, WeightsRef, publish

Answer = TypeVar("Answer")


class RunFailed(RuntimeError):
    """The run cannot go on, for a reason that is not the user's; the message carries the worker's
    own error."""


class CoordinatorLost(RuntimeError):
    """The coordinator has died, or what it owned is gone; the learner group starts again from its
    checkpoint."""


@dataclass(frozen=True, kw_only=True)
class _Order:
    units: Sequence[Unit]
    tag: tuple[str, int]
    weights: WeightsRef | None
    """At the learner that orders."""
    reward: WeightsRef | None
    """Of the reward that the run fits anew."""


def ask_until_answered(call: Callable[[], ray.ObjectRef], seconds: float) -> Any:
    """The answer of an actor that may be away for a while: asked again until ``seconds`` have
    passed without one."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ray.get(call(), timeout=seconds)
        except ray.exceptions.RayActorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _own_rows(tensors: Mapping[str, torch.Tensor]) -> list[Rows]:
    """What this process has of named tensors: of those that are spread its own rows."""
    return [
        Rows(name, own_part(one), own_rows(one)[0] if is_share(one) else 0)
        for name, one in tensors.items()
        if own_part(one).numel()
    ]


class RemoteCollect:
    """rlalign.alignment.loop's Collect over a cluster; one per learner process, of which the main
    one orders."""

    def __init__(
        self,
        run: Run,
        coordinator: ActorHandle,
        *,
        incarnation: str,
        is_main: bool,
        homes: Sequence[str],
        rounded: frozenset[str] = frozenset(),
    ) -> None:
        """``homes``: the node of each learner process, by Ray's id. ``rounded`` names the policy's
        weights that rollouts need in bfloat16 only."""
        self._run, self._coordinator, self._incarnation = run, coordinator, incarnation
        self._is_main, self._learners = is_main, len(homes)
        self._homes = frozenset(homes)
        self._rounded = rounded
        self._name = uuid.uuid4().hex
        self._published: dict[str, WeightsRef] = {}
        """Whose weights -> the last ones."""
        self._orders: dict[int, _Order] = {}
        self._next = 0
        self._life = 0
        self._restarts: dict[str, float] = {}
        runtime = run.runtime
        attempt = runtime.unit_timeout_seconds + runtime.start_seconds
        self._patience = runtime.max_attempts * attempt + runtime.start_seconds

    def order(self, units: Sequence[Unit], weights: Weights, reward: Weights | None = None) -> int:
        published = given = None
        # of weights that are spread every learner publishes what it holds
        if self._is_main or are_shares(weights.tensors.values()):
            published = self._publish("policy", weights, self._rounded)
        if self._is_main:
            given = self._publish("reward", reward) if reward is not None else None
        return self._order(_Order(units=units, tag=weights.tag, weights=published, reward=given))

    def _publish(
        self, whose: str, weights: Weights, rounded: frozenset[str] = frozenset()
    ) -> WeightsRef:
        """Weights in shared memory, put there once."""
        found = self._published.get(whose)
        if found is None or found.tag != weights.tag:
            manifests = (publish(_own_rows(weights.tensors), rounded),)
            if are_shares(weights.tensors.values()):
                manifests = self._survives(lambda: self._exchange(weights.tag, manifests))
            found = self._published[whose] = WeightsRef(tag=weights.tag, manifests=manifests)
        return found

    def _exchange(
        self, tag: tuple[str, int], own: tuple[ray.ObjectRef, ...]
    ) -> tuple[ray.ObjectRef, ...]:
        """Tells which part of some weights this learner has published; gives the main one the parts
        of all learners, and the others their own."""
        coordinator = self._coordinator
        given = coordinator.give_part.remote(self._incarnation, tag, self._name, own)
        ray.get(given, timeout=self._patience)
        if not self._is_main:
            return own
        parts = coordinator.take_parts.remote(self._incarnation, tag, self._learners)
        return tuple(ray.get(parts, timeout=self._patience))

    def _order(self, order: _Order) -> int:
        self._next += 1
        self._orders[self._next] = order
        if self._is_main:
            self._survives(lambda: self._send(self._next))
        return self._next

    def _send(self, ticket: int) -> None:
        order = self._orders[ticket]
        sent = self._coordinator.order.remote(
            self._incarnation,
            ticket,
            list(order.units),
            order.tag,
            order.weights.manifests if order.weights is not None else (),
            order.reward,
        )
        ray.get(sent, timeout=self._patience)

    def gather(self, ticket: int, tell: Tell = tell_nobody) -> list[Scored]:
        order = self._orders[ticket]
        found: dict[int, Scored] = {}

        # an order may need to be given again for units whose results are gone
        tickets = {ticket: list(range(len(order.units)))}  # ticket -> places of its units
        while tickets:
            number, places = tickets.popitem()
            missing = set(places)
            for some in self._results(number):
                fetched = self._fetched([result for _, result in some])
                for (at, result), content in zip(some, fetched, strict=True):
                    if content is not None:
                        place = places[at]
                        found[place] = self._scored(order, order.units[place], result, content)
                        missing.discard(place)
                tell(len(found), len(order.units))
            del self._orders[number]

            # results that a dead node held are ordered once more
            if missing:
                left = sorted(missing)
                again = replace(order, units=[order.units[place] for place in left])
                tickets[self._order(again)] = left
        return [found[place] for place in range(len(order.units))]

    def _results(self, ticket: int) -> Iterator[list[tuple[int, UnitResult]]]:
        """A ticket's results as they are finished; once more from the start where the coordinator
        is a new one."""
        # a new coordinator has none of the results that the last one had
        since = 0
        life = self._life

        def ask() -> list[tuple[int, UnitResult]] | Failure | None:
            nonlocal since, life
            if life != self._life:
                since = 0
                life = self._life
            asked = self._coordinator.gather.remote(
                self._incarnation, ticket, since, self._learners
            )
            return ray.get(asked, timeout=self._patience)

        # results come as they are ready
        while since < len(self._orders[ticket].units):
            results = self._survives(ask)
            if isinstance(results, Failure):
                raise UserError(results.message) if results.is_users else RunFailed(results.message)
            if results is None:
                self._begin_again()
                continue
            since += len(results)
            if results:
                yield results

    def _fetched(self, results: Sequence[UnitResult]) -> list[Any]:
        """Per unit (trajectory, samples); None where they lay on a node, or belonged to a process,
        that is gone."""
        refs = [ref for result in results for ref in result.refs]
        try:
            flat = ray.get(refs, timeout=self._patience)  # at once: one question to the store
            return list(zip(flat[::2], flat[1::2], strict=True))
        except ray.exceptions.ObjectLostError as error:
            if self._learners > 1:
                raise CoordinatorLost(f"samples are gone: {error}") from error
        found: list[Any] = []
        for result in results:
            try:
                found.append(tuple(ray.get(list(result.refs), timeout=self._patience)))
            except ray.exceptions.ObjectLostError:
                found.append(None)
        return found

    def _scored(
        self, order: _Order, unit: Unit, result: UnitResult, content: tuple[Any, Any]
    ) -> Scored:
        trajectory, samples = content
        return Scored(
            unit=unit,
            policy_version=order.tag[1],
            raw=result.raw,
            total_B=total(self._run.rewards, result.raw, self._run.combine),
            trajectory=trajectory,
            media_BFCHW=samples.get("media"),
            seconds=result.seconds,
        )

    def facts(self) -> Mapping[str, float]:
        """The coordinator's counters. A new one may not know of the last restarts, so they never
        count down."""
        found: dict[str, float] = ask_until_answered(
            lambda: self._coordinator.facts.remote(), self._patience
        )
        for name in [n for n in found if n.startswith("restarts/")]:
            found[name] = self._restarts[name] = max(found[name], self._restarts.get(name, 0))
        return found

    def leaves(self) -> bool:
        return bool(self._homes & draining_nodes().keys())

    def record(self, line: dict[str, Any]) -> None:
        """A metrics line or an evaluation, for the driver's screen and Ray's metrics."""
        ask_until_answered(lambda: self._coordinator.record.remote(line), self._patience)

    def _survives(self, call: Callable[[], Answer]) -> Answer:
        """The call's answer, also when the coordinator dies under it."""
        deadline = time.monotonic() + self._run.runtime.start_seconds
        while True:
            try:
                return call()
            except ray.exceptions.RayActorError as error:
                if self._learners > 1:
                    raise CoordinatorLost(f"the coordinator died: {error}") from error
                if time.monotonic() > deadline:
                    raise RunFailed(f"the coordinator does not come back: {error}") from error
                time.sleep(0.2)
                self._begin_again()

    def _begin_again(self) -> None:
        """Tells a coordinator that has come back who orders, and what is waited for."""
        if self._learners > 1:
            raise CoordinatorLost("the coordinator died")
        self._life += 1
        try:
            ray.get(self._coordinator.begin.remote(self._incarnation), timeout=self._patience)
            for ticket in self._orders:
                self._send(ticket)
        except ray.exceptions.RayActorError:
            time.sleep(0.2)  # still away: whoever called tries again
