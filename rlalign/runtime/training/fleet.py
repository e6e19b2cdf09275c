"""Every actor of a run: created, scaled, handed to the coordinator, ended. Owned by the driver, so
they outlive a learner.

The driver is the one who knows how many workers are wanted; the coordinator knows which of them
work. ``reconcile`` brings the two together, twice a second: new actors are handed over, those that
are one too many leave when their unit is done, and a coordinator that was killed and has come back
is told everything again.
"""

from __future__ import annotations

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
from rlalign.runtime.words import create_encoder, reader_of
from rlalign.runtime.workers import PolicySource


class Fleet:
    """The actors of one run. Names tell role and number on the dashboard."""

    def __init__(self, run: Run, *, places_are_cores: bool) -> None:
        """``places_are_cores`` False: a local Ray, where workers beyond the first ones reserve a
        GPU's share at most."""
        # what was asked for
        self._run = run
        self.owner = name_owner(run.name)
        self._places_are_cores = places_are_cores
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
        self._create()

        # the coordinator hears of members only when they have changed
        try:
            standing: Any = ray.get(self.coordinator.standing.remote(), timeout=30)
            told = (
                standing.epoch,
                *((role, tuple(members)) for role, members in self._members.items()),
            )
            if told != self._told:
                ray.get(self.coordinator.adopt.remote(self._members, self._standing), timeout=30)
                self._told = told
                standing = ray.get(self.coordinator.standing.remote(), timeout=30)
            self._standing = standing
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None

        # a worker ends once the coordinator no longer uses it
        for role, leaving in self._leaving.items():
            for number in leaving.keys() - set(standing.numbers[role]):
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
            while len(members) > count:
                number = max(members)
                self._leaving[role][number] = members.pop(number)

    def _worker(self, role: Role, number: int) -> ActorHandle:
        counts = self._places_are_cores or number < self._first[role]
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
    )
