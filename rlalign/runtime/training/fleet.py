"""Every actor of a run: created, scaled, handed to the coordinator, ended. Owned by the driver, so
they outlive a learner.

The driver is the one who knows how many workers are wanted; the coordinator knows which of them
work. ``reconcile`` brings the two together, twice a second: new actors are handed over, those that
are one too many leave when their unit is done, and a coordinator that was killed and has come back
is told everything again. Of a node that drains all workers leave in the same way, and others start
elsewhere at once; one that still works when the node's time is over is ended, so that its unit is
given out again without waiting for Ray to miss the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlalign.alignment.control import Asked
from rlalign.alignment.models import Model
from rlalign.config import Run
from rlalign.rewards.base import Reward
from rlalign.runtime.actors import (
    RESTART,
    actor_name,
    create_reward_worker,
    name_owner,
)
from rlalign.runtime.groups import create_policy_worker, free_places
from rlalign.runtime.roles import COORDINATOR, ROLLOUT, Role, reward_role
from rlalign.runtime.training.coordinator import Coordinator, Standing
from rlalign.runtime.training.nodes import Nodes
from rlalign.runtime.words import create_encoder, reader_of
from rlalign.runtime.workers import PolicySource


class Fleet:
    """The actors of one run. Names tell role and number on the dashboard."""

    def __init__(self, run: Run, *, places_are_cores: bool, nodes: Nodes | None = None) -> None:
        """``places_are_cores`` False: a local Ray, where workers beyond the first ones reserve a
        GPU's share at most. ``nodes``: what an earlier driver of the run has counted."""
        # what was asked for
        self._run = run
        self.nodes = nodes or Nodes()
        self.owner = name_owner(run.name)
        self.places_are_cores = places_are_cores
        self._rewards: dict[Role, Reward] = {
            reward_role(r.title): r for r in run.rewards_for("evaluate")
        }

        # how many workers there should be, and the ones there are
        self.wanted = {ROLLOUT: run.runtime.rollout.workers}
        self.wanted |= dict.fromkeys(self._rewards, run.runtime.reward.workers)
        self._first = dict(self.wanted)
        self._spares = dict.fromkeys(self._rewards, run.runtime.reward.spares)
        self._members: dict[Role, dict[int, ActorHandle]] = {role: {} for role in self.wanted}
        self._leaving: dict[Role, dict[int, ActorHandle]] = {role: {} for role in self.wanted}
        self._next = dict.fromkeys(self.wanted, 0)

        # the node that the encoder was last told to leave
        self._left = ""

        # what the coordinator was last told
        self._told: tuple[Any, ...] = ()
        self._standing: Standing | None = None

        # prompts are encoded by an actor of their own, where the policy asks for it
        self.encoder = create_encoder(self.owner, run.policy, run.runtime)

        # the coordinator stays beside the learner, and takes no core
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        alone: Any = {"num_cpus": 0, "max_concurrency": 1000, **RESTART}
        kind: Any = ray.remote(**alone)(Coordinator)
        self.coordinator: ActorHandle = kind.options(
            name=actor_name(self.owner, COORDINATOR, 0), scheduling_strategy=here
        ).remote(run)
        self._create()

    def scale(self, asked: Asked) -> bool:
        """Takes up what was asked for; whether anything changed. An unknown reward is ignored: the
        command has refused it."""
        before = dict(self.wanted)
        if asked.rollout_workers is not None:
            self.wanted[ROLLOUT] = asked.rollout_workers
        for title, count in asked.reward_workers.items():
            if reward_role(title) in self.wanted:
                self.wanted[reward_role(title)] = count
        return self.wanted != before

    def size(self, role: Role) -> int:
        """How many actors a role is to have: those that were asked for, and spares. The pool gives
        work to the least busy one of the lowest number, so the last ones work where the others are
        busy or dead."""
        return self.wanted[role] + self._spares.get(role, 0)

    def reconcile(self) -> Standing | None:
        """Creates and retires until the pools are as wanted. None while the coordinator does not
        answer."""
        self.nodes.look()
        self._leave_nodes()
        self._create()

        # the coordinator hears of members only when they have changed
        facts = self.nodes.facts()
        try:
            standing: Any = ray.get(self.coordinator.standing.remote(facts), timeout=30)
            told = (
                standing.epoch,
                *((role, tuple(members)) for role, members in self._members.items()),
            )
            if told != self._told:
                ray.get(self.coordinator.adopt.remote(self._members, self._standing), timeout=30)
                self._told = told
                standing = ray.get(self.coordinator.standing.remote(facts), timeout=30)
            self._standing = standing
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None
        if self.nodes.draining:
            self.coordinator.rescue.remote(sorted(self.nodes.draining))

        # a worker ends once the coordinator no longer uses it, or when its node is about to
        for role, leaving in self._leaving.items():
            late = {n for n, actor in leaving.items() if self._is_late(actor)}
            for number in (leaving.keys() - set(standing.numbers[role])) | late:
                ray.kill(leaving.pop(number))
                free_places(self.owner, role, number)
        return standing

    def end(self) -> None:
        """Kills every actor."""
        for actors in (*self._members.values(), *self._leaving.values()):
            for actor in actors.values():
                ray.kill(actor)
        ray.kill(self.coordinator)
        if self.encoder is not None:
            ray.kill(self.encoder)

    def _create(self) -> None:
        for role, members in self._members.items():
            count = self.size(role)
            while len(members) < count:
                members[self._next[role]] = self._worker(role, self._next[role])
                self._next[role] += 1
            held = self.nodes.held() if len(members) > count else {}
            while len(members) > count:
                number = self._dispensable(members, held)
                self._leaving[role][number] = members.pop(number)

    def _dispensable(self, members: Mapping[int, ActorHandle], held: Mapping[str, int]) -> int:
        """Who leaves first where there are too many: one that waits for a place, or else one whose
        node holds the fewest of the run's actors, so that the node is soon not needed."""

        def neighbours(number: int) -> int:
            return held.get(self.nodes.home(members[number]) or "", 0)

        return min(members, key=lambda number: (neighbours(number), -number))

    def _leave_nodes(self) -> None:
        """Takes the workers off the nodes that drain: others are created in their place."""
        for role, members in self._members.items():
            for number in [n for n, a in members.items() if self.nodes.seconds_left(a) is not None]:
                self._leaving[role][number] = members.pop(number)

        # the encoder keeps nothing that cannot be made again: Ray starts it elsewhere
        if self.encoder is not None and self.nodes.seconds_left(self.encoder) is not None:
            home = self.nodes.home(self.encoder)
            if home and home != self._left:
                self._left = home
                ray.kill(self.encoder, no_restart=False)

    def _is_late(self, actor: ActorHandle) -> bool:
        """Whether its node is as good as gone."""
        left = self.nodes.seconds_left(actor)
        return left is not None and left < 0

    def _worker(self, role: Role, number: int) -> ActorHandle:
        counts = self.places_are_cores or number < self._first[role]
        if role == ROLLOUT:
            source = policy_source(self._run, self.encoder)
            return create_policy_worker(self.owner, number, source, counts=counts)
        return create_reward_worker(
            self.owner, number, self._rewards[role], self._run.runtime, counts=counts
        )


def policy_source(run: Run, encoder: ActorHandle | None = None) -> PolicySource:
    """What a run's rollout workers load, and whom they ask for words."""
    return PolicySource(
        model=Model(title=run.policy.name, recipe=run.policy),
        runtime=run.runtime,
        reader=reader_of(encoder, run.runtime),
        shapes=((run.plan, run.samples_per_unit),),
    )
