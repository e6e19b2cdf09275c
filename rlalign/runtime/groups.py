"""Rollout workers: processes that denoise, or groups of such over which a denoiser is spread.

    pool --pieces--> lead --one each--> member 1 ... member N - 1   (the lead's own actors)
                      |                    |
                      +--> member 0        |   (a thread of the lead)
                             +-- blocks ---+   (a group of torch.distributed)

For a pool a group is one worker that does N pieces at a time: the lead. It deals what waits, and
all members do their pieces in step (networks/lockstep.py); who has none gathers with the others.
None of them goes on without the others: where one dies the lead ends too, its actors end with it,
and Ray starts the group anew, as it does a worker of one process.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import ray
import ray.exceptions
import torch.distributed as group
from ray.actor import ActorHandle
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlalign.engine import Work
from rlalign.networks.lockstep import Lockstep, OutOfStep
from rlalign.networks.sharding import lost_a_peer
from rlalign.runtime.actors import RESTART, actor_class, actor_name, reserved
from rlalign.runtime.engine import SEATS
from rlalign.runtime.reservation import bundle_of
from rlalign.runtime.roles import ROLLOUT, Role
from rlalign.runtime.weights import Manifest
from rlalign.runtime.workers import PolicySource, PolicyWorker, Worker

FILL_SECONDS = 0.02
"""How long a lead waits for a piece for each of its members: pieces that are given at once arrive
within that."""
GRACE_SECONDS = 5.0
"""Until a lead ends whose member has died, where the group itself does not say so before."""
KEPT = 2
"""Versions of weights that a lead keeps for its members."""
PATIENCE = timedelta(days=1)
"""Of members for each other, in loading and at work: a pool replaces who hangs."""


# --- making them ----------------------------------------------------------------------------------


def create_policy_worker(
    owner: str, number: int, source: PolicySource, *, counts: bool = True
) -> ActorHandle:
    """A rollout worker: a process, or a group of them. Without ``counts`` each reserves its GPU's
    share alone."""
    rollout = source.runtime.rollout
    bundle = bundle_of(ROLLOUT, rollout)
    name = actor_name(owner, ROLLOUT, number)
    label = f"{ROLLOUT} {number}"
    if rollout.shard == 1:
        alone = actor_class(PolicyWorker, bundle, counts=counts)
        # a thread for each piece that it has, and one for what asks how it is
        threads = {"max_concurrency": SEATS + 1}
        return alone.options(name=name, **threads).remote(source, label)

    # places for all of its processes or for none, and on one node where there is room
    needs = {what: much for what, much in bundle.needs.items() if counts or what == "GPU"}
    places = None
    if needs:
        where: dict[str, Any] = {"strategy": "PACK", "name": name}
        if bundle.labels:
            where["bundle_label_selector"] = [dict(bundle.labels)] * rollout.shard
        places = placement_group([needs] * rollout.shard, **where)
    options = reserved(bundle, counts=counts)
    lead = {**options, **RESTART, **_place(places, 0, bundle.labels), "name": name}
    lead["max_concurrency"] = SEATS * rollout.shard + 2
    kind: Any = ray.remote(**lead)(PolicyGroup)
    return kind.remote(source, label, options, places)


def free_places(owner: str, role: Role, number: int) -> None:
    """Gives back what a group of processes has reserved, of which the lead has been killed; does
    nothing for other workers."""
    with contextlib.suppress(ValueError):
        remove_placement_group(get_placement_group(actor_name(owner, role, number)))


def _place(places: PlacementGroup | None, number: int, labels: Mapping[str, str]) -> dict[str, Any]:
    """Ray's options for the process of a number: its place, or labels where none is reserved."""
    if places is None:
        return {"label_selector": dict(labels)} if labels else {}
    strategy = PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=number)
    return {"scheduling_strategy": strategy}


# --- a member -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which process of a group one is, and where they find each other."""

    number: int
    count: int
    host: str
    port: int

    def join(self, device: str, store: group.Store | None = None) -> None:
        """Makes this process one of the group. ``store`` is the lead's own, which the others look
        for."""
        if store is None:
            store = group.TCPStore(self.host, self.port, self.count, timeout=PATIENCE)
        group.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            store=store,
            rank=self.number,
            world_size=self.count,
            timeout=PATIENCE,
        )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of work for one member, and the weights that it is to be done under."""

    work: Work
    tag: tuple[str, int] | None
    weights: Sequence[Manifest]
    """Where the weights are; empty where none are meant."""


class PolicyMember(PolicyWorker):
    """One process of a group: holds a part of the denoiser and all else of the policy, and does
    pieces in step with the others."""

    def __init__(
        self, source: PolicySource, label: str, rank: Rank, store: group.Store | None = None
    ) -> None:
        rank.join(source.runtime.device, store)
        super().__init__(source, label, spread=True, trained=False)
        if self.refusal is not None:
            return
        family: Any = self._policy.family
        family.in_turn = True
        self._step = Lockstep(
            list(family.denoisers.values()), partial(family.try_out, self._policy.precision)
        )
        self.ready_at = time.time()

    def take(self, piece: Piece | None) -> tuple[Any, ...] | None:
        """What ``do`` gives of a piece, once no member has anything to ask any more; None where
        there is none. Ends the process where the group is broken."""
        try:
            return self._done_in_step(piece)
        except OutOfStep:
            end_process()

    def _done_in_step(self, piece: Piece | None) -> tuple[Any, ...] | None:
        answer = failure = None
        try:
            if piece is not None:
                answer = self.do(piece.work, piece.tag, *piece.weights)
        except OutOfStep:
            raise
        except Exception as error:  # noqa: BLE001 -- raised below, when the others are done
            self._step.recover()
            failure = error
        self._step.rest()
        if failure is not None:
            raise failure
        return answer


def end_process() -> NoReturn:
    """Ends this process with the error that is being handled in its log: what it is a part of
    cannot go on."""
    traceback.print_exc()
    os._exit(1)


# --- the lead -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A piece that somebody waits for."""

    piece: Piece
    answer: Future[Any] = field(default_factory=Future)


class PolicyGroup(Worker):
    """A ``PolicyWorker`` of several processes, for those who call it: several pieces at a time."""

    def __init__(
        self,
        source: PolicySource,
        label: str,
        options: Mapping[str, Any],
        places: PlacementGroup | None,
    ) -> None:
        """``options`` are Ray's for each of the processes, on ``places`` where there are some."""
        self.label = label
        self._count = source.runtime.rollout.shard
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._weights: dict[tuple[str, int], tuple[Manifest, ...]] = {}
        self._lock = threading.Lock()
        host = ray.util.get_node_ip_address()
        store = _open_store(host, self._count)
        ranks = [
            Rank(number=number, count=self._count, host=host, port=store.port)
            for number in range(self._count)
        ]
        self._others = [_create_member(source, label, rank, options, places) for rank in ranks[1:]]

        # this process's own member belongs to one thread
        self._thread = ThreadPoolExecutor(1, "member")
        with self._loading():
            made = self._thread.submit(PolicyMember, source, label, ranks[0], store)
            self._own = made.result()
        self.refusal = self._own.refusal
        if self.refusal is None:
            self._thread.submit(self._work)
        self.ready_at = time.time()

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """Inside, a member that dies ends this process; one whose constructor fails has its error
        raised."""
        asked = [self._watched(other.ping.remote()) for other in self._others]
        try:
            yield
        except RuntimeError as error:
            if not lost_a_peer(error):
                raise
            for ref in asked:
                try:
                    ray.get(ref, timeout=GRACE_SECONDS)
                except ray.exceptions.RayActorError as death:
                    if death.actor_init_failed:
                        raise
                except ray.exceptions.GetTimeoutError:
                    continue
            end_process()

    def do(
        self,
        work: Work,
        tag: tuple[str, int] | None = None,
        *manifests: Manifest,
    ) -> tuple[Any, ...]:
        """As ``PolicyWorker.do``, of whichever member is free."""
        weights = self._kept(tag, manifests)
        if tag is not None and not weights:
            return (*[None] * work.parts, None)
        call = _Call(piece=Piece(work=work, tag=tag, weights=weights))
        self._calls.put(call)
        found: tuple[Any, ...] = call.answer.result()
        return found

    def _kept(
        self, tag: tuple[str, int] | None, manifests: tuple[Manifest, ...]
    ) -> tuple[Manifest, ...]:
        """Where the weights of a tag are; nowhere, where it was not told, or long ago."""
        if tag is None:
            return ()
        with self._lock:
            if manifests and tag not in self._weights:
                self._weights[tag] = manifests
                while len(self._weights) > KEPT:
                    del self._weights[next(iter(self._weights))]
            return self._weights.get(tag, ())

    # --- in the thread of its own member ---------------------------------------------------------

    def _work(self) -> None:
        """Deals what waits, for ever."""
        try:
            while True:
                self._deal(self._waiting())
        except BaseException:  # noqa: BLE001 -- nobody else would hear of it
            end_process()

    def _waiting(self) -> list[_Call]:
        """The next calls, one for each member or fewer; waits for the first."""
        found = [self._calls.get()]
        deadline = time.monotonic() + FILL_SECONDS
        with contextlib.suppress(queue.Empty):
            while len(found) < self._count:
                found.append(self._calls.get(timeout=max(0.0, deadline - time.monotonic())))
        return found

    def _deal(self, calls: Sequence[_Call]) -> None:
        """Has calls done, one by each member, and answers them."""
        # the others' pieces are sent first: this thread is busy with its own until it is done
        first, *others = calls
        pieces = [call.piece for call in others]
        pieces += [None] * (self._count - len(calls))  # type: ignore[list-item]
        refs = [
            self._watched(other.take.remote(piece))
            for other, piece in zip(self._others, pieces, strict=True)
        ]
        _answer(first, partial(self._own.take, first.piece))
        for call, ref in zip(others, refs, strict=False):
            _answer(call, partial(_fetch, ref))
        ray.wait(refs, num_returns=len(refs))

    def _watched(self, ref: ray.ObjectRef) -> ray.ObjectRef:
        """The same; where its process dies this one ends, soon: before that it may say why."""

        def look(answer: Future[Any]) -> None:
            if isinstance(answer.exception(), ray.exceptions.RayActorError):
                timer = threading.Timer(GRACE_SECONDS, os._exit, (1,))
                timer.daemon = True
                timer.start()

        ref.future().add_done_callback(look)
        return ref


def _open_store(host: str, count: int) -> group.TCPStore:
    """Where the processes of a group find each other: on the node's address alone."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.create_server((host, 0), family=family)
    port = bound.getsockname()[1]
    return group.TCPStore(
        host,
        port,
        count,
        is_master=True,
        wait_for_workers=False,
        timeout=PATIENCE,
        master_listen_fd=bound.detach(),
    )


def _create_member(
    source: PolicySource,
    label: str,
    rank: Rank,
    options: Mapping[str, Any],
    places: PlacementGroup | None,
) -> ActorHandle:
    """A process of a group beside the lead's, which this process owns. Ray does not restart it: the
    group begins anew as a whole."""
    place = _place(places, rank.number, source.runtime.rollout.labels)
    kind: Any = ray.remote(**options, **place, max_restarts=0, max_task_retries=0)(PolicyMember)
    return kind.remote(source, f"{label}, process {rank.number + 1} of {rank.count}", rank)


def _fetch(ref: ray.ObjectRef) -> Any:
    """The answer of another member, or what it raised. Ends this process where it is dead."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from error
    except ray.exceptions.RayActorError:
        end_process()


def _answer(call: _Call, give: partial[Any]) -> None:
    """Answers a call with what a function gives or raises."""
    try:
        call.answer.set_result(give())
    except Exception as error:  # noqa: BLE001 -- raised where it is waited for
        call.answer.set_exception(error)
