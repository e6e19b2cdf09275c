"""Every actor of a run: created, scaled, handed to the coordinator, ended. Owned by the driver, so they outlive a learner.

The driver is the one who knows how many workers are wanted; the coordinator knows which of them work. ``reconcile`` brings
the two together, twice a second: new actors are handed over, those that are one too many leave when their unit is done, and
a coordinator that was killed and has come back is told everything again.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlalign.config import Run
from rlalign.control import Asked
from rlalign.registry import UserError
from rlalign.rewards.base import Reward
from rlalign.runtime.coordinator import Coordinator, Standing
from rlalign.runtime.placement import ROLLOUT, reward_role
from rlalign.runtime.workers import RewardWorker, RolloutWorker

RESTART: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 0}


class Fleet:
    """The actors of one run. Names tell role and number on the dashboard."""

    def __init__(self, run: Run, *, places_are_cores: bool) -> None:
        """``places_are_cores`` False: a local Ray, where workers beyond the first ones reserve a GPU's share at most."""
        self._run, self._mark, self._places_are_cores = run, uuid.uuid4().hex[:6], places_are_cores
        self._rewards: dict[str, Reward] = {reward_role(r.title): r for r in run.rewards_for("evaluate")}
        self.wanted = {ROLLOUT: run.runtime.rollout_workers}
        self.wanted |= dict.fromkeys(self._rewards, run.runtime.reward_workers)
        self._first = dict(self.wanted)
        self._spares = dict.fromkeys(self._rewards, run.runtime.reward_spares)
        self._members: dict[str, dict[int, ActorHandle]] = {role: {} for role in self.wanted}
        self._leaving: dict[str, dict[int, ActorHandle]] = {role: {} for role in self.wanted}
        self._next = dict.fromkeys(self.wanted, 0)
        self._told: tuple[Any, ...] = ()
        self._standing: Standing | None = None
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        alone: Any = {"num_cpus": 0, "max_concurrency": 1000, **RESTART}
        kind: Any = ray.remote(**alone)(Coordinator)
        self.coordinator: ActorHandle = kind.options(
            name=self._name("coordinator", 0), scheduling_strategy=here
        ).remote(run)
        self._create()

    def scale(self, asked: Asked) -> bool:
        """Takes up what was asked for; whether anything changed. An unknown reward is ignored: the command has refused it."""
        before = dict(self.wanted)
        if asked.rollout_workers is not None:
            self.wanted[ROLLOUT] = asked.rollout_workers
        for title, count in asked.reward_workers.items():
            if reward_role(title) in self.wanted:
                self.wanted[reward_role(title)] = count
        return self.wanted != before

    def size(self, role: str) -> int:
        """How many actors a role is to have: those that were asked for, and spares. The pool gives work to the least busy
        one of the lowest number, so the last ones work where the others are busy or dead."""
        return self.wanted[role] + self._spares.get(role, 0)

    def reconcile(self) -> Standing | None:
        """Creates and retires until the pools are as wanted. None while the coordinator does not answer."""
        self._create()
        try:
            standing: Any = ray.get(self.coordinator.standing.remote(), timeout=30)
            told = (standing.epoch, *((role, tuple(members)) for role, members in self._members.items()))
            if told != self._told:
                ray.get(self.coordinator.adopt.remote(self._members, self._standing), timeout=30)
                self._told = told
                standing = ray.get(self.coordinator.standing.remote(), timeout=30)
            self._standing = standing
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None
        for role, leaving in self._leaving.items():
            for number in leaving.keys() - set(standing.numbers[role]):
                ray.kill(leaving.pop(number))
        return standing

    def end(self) -> None:
        """Kills every actor."""
        for actors in (*self._members.values(), *self._leaving.values()):
            for actor in actors.values():
                ray.kill(actor)
        ray.kill(self.coordinator)

    def _create(self) -> None:
        for role, members in self._members.items():
            count = self.size(role)
            while len(members) < count:
                members[self._next[role]] = self._worker(role, self._next[role])
                self._next[role] += 1
            while len(members) > count:
                number = max(members)
                self._leaving[role][number] = members.pop(number)

    def _worker(self, role: str, number: int) -> ActorHandle:
        runtime = self._run.runtime
        counts = self._places_are_cores or number < self._first[role]
        if role == ROLLOUT:
            places = options(
                runtime.rollout_cpus if counts else 0.0,
                runtime.rollout_gpus,
                runtime.rollout_resources if counts else {},
                runtime.rollout_labels,
            )
            kind: Any = ray.remote(**places, **RESTART)(RolloutWorker)
            return kind.options(name=self._name(ROLLOUT, number)).remote(self._run, f"{ROLLOUT} {number}")
        reward = self._rewards[role]
        places = options(
            runtime.reward_cpus if counts else 0.0,
            runtime.reward_gpus,
            runtime.reward_resources if counts else {},
            runtime.reward_labels,
        )
        kind = ray.remote(**places, **RESTART)(RewardWorker)
        return kind.options(name=self._name(f"reward-{reward.title}", number)).remote(
            reward, runtime.reward_device, runtime.rollout_threads, f"{role} {number}"
        )

    def _name(self, role: str, number: int) -> str:
        return f"{self._run.name}-{self._mark}/{role}-{number}"


def options(cpus: float, gpus: float, resources: Mapping[str, float], labels: Mapping[str, str]) -> dict[str, Any]:
    """What an actor reserves, as Ray wants to hear it. Raises UserError for a name that Ray keeps for itself."""
    for name in resources:
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            raise UserError(
                f"runtime: custom resources must have names of their own, got {name!r}; use the setting for it"
            )
    found: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
    if resources:
        found["resources"] = dict(resources)
    if labels:
        found["label_selector"] = dict(labels)
    return found
