"""Which unit is where: one asyncio actor that holds references and small facts only, never arrays
of pictures.

    learner --order(units, weights ref)--> coordinator --produce--> rollout pool --media ref-->
    reward pools
       ^                                       |
       +------ gather: refs and scores --------+

A unit whose worker dies is given out again, up to ``max_attempts`` times; then the run ends with
the worker's own error. Units belong to an *incarnation* of the learner: when a killed learner comes
back, what it had ordered is dropped and ordered again, so that no unit is used twice. A coordinator
that was killed comes back empty and is told everything again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import traceback
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.experimental import get_local_object_locations

from rlalign.config import Run
from rlalign.core.records import Unit
from rlalign.core.registry import UserError
from rlalign.runtime.gauges import Gauges
from rlalign.runtime.pool import ObjectGone, PoolLost, PoolState, UnitFailed
from rlalign.runtime.roles import ROLLOUT, Role
from rlalign.runtime.training.production import Production, UnitResult
from rlalign.runtime.training.scaling import WORKED
from rlalign.runtime.weights import WeightsRef

ANSWER_SECONDS = 30.0
"""A learner that waits for samples hears at least this often that there are none yet: how long they
take is not its concern."""

COPY_SECONDS = 30.0
"""For copies from nodes that drain, before it is looked anew what there is to copy."""


@dataclass(kw_only=True)
class Failure:
    """Why a run cannot go on."""

    message: str
    is_users: bool


class _Ticket:
    """Units that were ordered together."""

    def __init__(self, tasks: Sequence[asyncio.Task[UnitResult]]) -> None:
        self.tasks = tasks
        self.finished: list[int] = []
        """Places of units, in the order in which they were done."""
        self.broken: asyncio.Task[UnitResult] | None = None
        """The first that failed or was given up."""
        self.learners = 0
        """Those that have all of it."""
        self._changed = asyncio.Event()
        for place, task in enumerate(tasks):
            task.add_done_callback(lambda done, p=place: self._note(p, done))

    def refs(self) -> list[ray.ObjectRef]:
        """What was made so far and not fetched by everybody."""
        done = [task for task in self.tasks if task.done() and not task.cancelled()]
        return [ref for task in done if not task.exception() for ref in task.result().refs]

    def _note(self, place: int, task: asyncio.Task[UnitResult]) -> None:
        if task.cancelled() or task.exception():
            self.broken = self.broken or task
        self.finished.append(place)
        self._changed.set()

    async def after(self, since: int, seconds: float) -> list[tuple[int, UnitResult]]:
        """(place, result) of what was finished after the first ``since``: an eighth of the ticket
        at least, or the rest of it; whatever there is when ``seconds`` have passed.

        Raises what a unit raised.
        """
        enough = min(since + max(1, len(self.tasks) // 8), len(self.tasks))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while len(self.finished) < enough and self.broken is None:
                    self._changed.clear()
                    await self._changed.wait()
        if self.broken is not None:
            self.broken.result()
        return [(place, self.tasks[place].result()) for place in self.finished[since:]]


@dataclass(kw_only=True)
class _Ledger:
    """What one incarnation of the learner has ordered."""

    name: str
    tickets: dict[int, _Ticket] = field(default_factory=dict)
    ordered: asyncio.Condition = field(default_factory=asyncio.Condition)
    parts: dict[tuple[str, int], dict[str, Sequence[ray.ObjectRef]]] = field(default_factory=dict)
    """Tag of weights -> learner -> the manifests of the part that it has published."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How the coordinator's pools stand."""

    epoch: str
    """The coordinator's life: another one after it was killed, and it knows nothing then."""
    pools: Mapping[Role, PoolState]
    numbers: Mapping[Role, tuple[int, ...]]
    """Role -> members that belong to it or still finish their work."""
    queue: int
    """Units ordered and not finished."""
    samples: int
    """Produced and scored."""
    handled_bytes: int
    """Messages that passed through the coordinator."""


class Coordinator:
    """The actor (created by the driver, zero CPUs). It may die: the driver tells it its pools
    again, the learner its orders."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._epoch = uuid.uuid4().hex
        self._gauges = Gauges(run.name)
        self._production = Production(run, self._gauges)
        self._ledger = _Ledger(name="")
        self._records: list[dict[str, Any]] = []
        self._news = asyncio.Condition()
        self._failure: Failure | None = None
        self._adopted = asyncio.Event()
        self._nodes: Mapping[str, float] = {}
        self._rescuing = False
        gc.collect()
        # what is imported by now stays: a full collection over it takes a fifth of a second,
        # amid a round
        gc.freeze()

    def __repr__(self) -> str:
        return f"coordinator of {self._run.name}"

    def process_id(self) -> int:
        """The operating system's process."""
        return os.getpid()

    # --- the learner's side ----------------------------------------------------------------------

    async def begin(self, incarnation: str) -> Failure | None:
        """A learner has started: what an earlier one had ordered is dropped. Answers with the
        failure of a run that is over.

        A learner that begins again has found the coordinator to be a new one, and orders again what
        it waits for.
        """
        if incarnation == self._ledger.name:
            return self._failure
        for ticket in self._ledger.tickets.values():
            for task in ticket.tasks:
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
        reward: WeightsRef | None = None,
    ) -> None:
        """Starts units under the weights whose manifests ``weights`` refers to (wrapped, so that
        the references travel), and under those of the reward that the run fits anew."""
        ledger = self._ledger
        if incarnation != ledger.name or ticket in ledger.tickets:
            return
        self._production.count(units)
        make = self._production.unit
        ledger.tickets[ticket] = _Ticket(
            [asyncio.ensure_future(make(u, tag, weights, reward)) for u in units]
        )
        async with ledger.ordered:
            ledger.ordered.notify_all()

    async def give_part(
        self,
        incarnation: str,
        tag: tuple[str, int],
        learner: str,
        manifests: Sequence[ray.ObjectRef],
    ) -> None:
        """One of several learners has published the part of some weights that it holds."""
        ledger = self._ledger
        if incarnation == ledger.name:
            ledger.parts.setdefault(tag, {})[learner] = manifests
            async with ledger.ordered:
                ledger.ordered.notify_all()

    async def take_parts(
        self, incarnation: str, tag: tuple[str, int], learners: int
    ) -> list[ray.ObjectRef]:
        """The manifests of all learners' parts of some weights, once there are so many; for the one
        that orders. They are kept no longer."""
        ledger = self._ledger
        if incarnation != ledger.name:
            return []
        async with ledger.ordered:
            await ledger.ordered.wait_for(lambda: len(ledger.parts.get(tag, ())) == learners)
        return list(chain.from_iterable(ledger.parts.pop(tag).values()))

    async def gather(
        self, incarnation: str, ticket: int, since: int, learners: int
    ) -> list[tuple[int, UnitResult]] | Failure | None:
        """The next (place, result) of a ticket after the ``since`` that the caller has, as they are
        finished, none of them for now, or why there will be none. A learner takes them over while
        others are still being made; all ``learners`` processes get all of them.

        None says that this coordinator has never heard of the learner: it is a new one.
        """
        ledger = self._ledger

        # a coordinator without a ledger has no orders yet
        if not ledger.name:
            return None
        if incarnation != ledger.name:
            return Failure(message="this learner has been replaced", is_users=False)

        # the question may arrive before the order
        async with ledger.ordered:
            await ledger.ordered.wait_for(lambda: ticket in ledger.tickets)
        try:
            found = ledger.tickets[ticket]
            results = await found.after(since, ANSWER_SECONDS)
        except ObjectGone as error:
            # said to the one who asks and not kept: the weights of a learner that has died are gone
            # with it, and the next one will order anew
            return Failure(message=str(error), is_users=False)
        except (UserError, PoolLost, UnitFailed) as error:
            self._failure = self._failure or Failure(
                message=str(error), is_users=isinstance(error, UserError)
            )
            return self._failure
        except asyncio.CancelledError:
            return Failure(message="this learner has been replaced", is_users=False)

        # a ticket is dropped once every learner has its results
        found.learners += since + len(results) == len(found.tasks)
        if found.learners == learners:
            del ledger.tickets[ticket]
        return results

    async def facts(self) -> dict[str, float]:
        """Counters for the metrics line, and how long a worker of each pool worked since the last
        one."""
        await self._adopted.wait()
        production = self._production
        worked = {f"{WORKED}{role.metric}": s for role, s in production.worked().items()}
        restarts = {role: pool.restarts for role, pool in production.pools.items()}
        return {
            **worked,
            **{name: self._nodes[name] for name in self._nodes if name != "nodes/draining"},
            "restarts/rollout": restarts.pop(ROLLOUT),
            "restarts/reward": sum(restarts.values()),
            "driver_bytes_per_sample": round(
                production.handled_bytes / max(production.samples, 1), 1
            ),
        }

    async def record(self, line: dict[str, Any]) -> None:
        """A metrics line or an evaluation, for the driver's screen and Ray's metrics."""
        self._records.append(line)
        self._gauges.line(line)
        async with self._news:
            self._news.notify_all()

    async def abort(self, failure: Failure) -> None:
        """The learner cannot go on."""
        self._failure = self._failure or failure

    # --- the driver's side -----------------------------------------------------------------------

    async def records(self, since: int, timeout_seconds: float) -> tuple[str, list[dict[str, Any]]]:
        """(epoch, records from number ``since`` on); waits for one up to the timeout."""
        with contextlib.suppress(TimeoutError):
            async with self._news:
                await asyncio.wait_for(
                    self._news.wait_for(lambda: len(self._records) > since), timeout_seconds
                )
        return self._epoch, self._records[since:]

    async def failure(self) -> Failure | None:
        """Why the run ended, if it failed."""
        return self._failure

    async def adopt(
        self, members: Mapping[Role, Mapping[int, ActorHandle]], before: Standing | None
    ) -> None:
        """Role -> number -> actor: who belongs to the pools from now on. Who is missing leaves when
        its work is done.

        ``before`` is what the run's coordinator last said: a new one counts on from there.
        """
        production = self._production
        goes_on = None if self._adopted.is_set() else before
        await production.pools.adopt(members)
        if goes_on:
            for role, pool in production.pools.items():
                pool.restarts += goes_on.pools[role].restarts
            production.samples += goes_on.samples
            production.handled_bytes += goes_on.handled_bytes
        self._adopted.set()

    async def rescue(self, nodes: Sequence[str]) -> None:
        """Copies finished samples that no learner has yet, and that lie on these nodes alone, to
        the coordinator's: they need not be made again when the nodes are gone."""
        if self._rescuing:
            return
        self._rescuing = True
        try:
            # in a thread: Ray is asked and waited for, and units come and go meanwhile
            tickets = self._ledger.tickets.values()
            refs = list(chain.from_iterable(one.refs() for one in tickets))
            await asyncio.to_thread(_copy_from, nodes, refs)
        finally:
            self._rescuing = False

    async def standing(self, nodes: Mapping[str, float] | None = None) -> Standing:
        """How the pools stand; also what Ray's metrics say of them, and of the run's ``nodes``
        (``Nodes.facts``), which are in the metrics line too."""
        # what the dashboard shows
        self._nodes = nodes or self._nodes
        for state in ("used", "draining"):
            if self._nodes:
                self._gauges.set("rlalign_nodes", self._nodes[f"nodes/{state}"], state=state)
        self._gauges.flush()
        pools = {role: pool.state() for role, pool in self._production.pools.items()}
        self._gauges.set("rlalign_queue_depth", self._production.queue)
        for role, state in pools.items():
            for name in ("ready", "starting", "lost"):
                self._gauges.set(
                    "rlalign_workers", getattr(state, name), role=role.label, state=name
                )

        # what the supervisor needs to see
        return Standing(
            epoch=self._epoch,
            pools=pools,
            numbers={
                role: tuple(sorted(pool.numbers())) for role, pool in self._production.pools.items()
            },
            queue=self._production.queue,
            samples=self._production.samples,
            handled_bytes=self._production.handled_bytes,
        )


def _copy_from(nodes: Sequence[str], refs: Sequence[ray.ObjectRef]) -> None:
    """Fetches the objects that lie on these nodes and nowhere else to this process's node."""
    places = get_local_object_locations(list(refs))  # small ones are with their owner: no node
    homes = {ref: set(found["node_ids"]) for ref, found in places.items()}
    alone = [ref for ref, home in homes.items() if home and home <= set(nodes)]
    if alone:
        ray.wait(alone, num_returns=len(alone), timeout=COPY_SECONDS, fetch_local=True)


def failure_of(error: BaseException) -> Failure:
    """An exception as what the driver shows: a user's mistake in one message, a fault of ours with
    its traceback."""
    if isinstance(error, UserError):
        return Failure(message=str(error), is_users=True)
    return Failure(message="".join(traceback.format_exception(error)), is_users=False)
