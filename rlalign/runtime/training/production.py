"""One unit's way: denoised by a worker of the rollout pool, scored by one of each reward's pool,
tried again where one dies.

Not an actor's methods but a plain object's: Ray wraps every method of an actor for tracing, private
ones too, and this is where a coordinator spends its time.
"""

from __future__ import annotations

import asyncio
import pickle
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from rlalign.config import Run
from rlalign.core.records import Unit, UnitKey
from rlalign.runtime.gauges import Gauges
from rlalign.runtime.pool import ObjectGone, Pool, call_with_retries
from rlalign.runtime.roles import ROLLOUT, Role, reward_role


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """What the coordinator knows of a finished unit."""

    raw: Mapping[str, np.ndarray]
    """Reward title -> (B,) float32."""
    seconds: Mapping[str, float]
    refs: tuple[ray.ObjectRef, ray.ObjectRef]
    """Trajectory and media."""


class Production:
    """The pools of a run, and what passes through them."""

    def __init__(self, run: Run, gauges: Gauges) -> None:
        self._runtime = run.runtime
        self._gauges = gauges
        patience = run.runtime.recovery_seconds
        start = run.runtime.start_seconds

        # one pool for rollouts, and one for each reward
        self.rollouts = Pool(ROLLOUT, patience_seconds=patience, start_seconds=start, in_flight=2)
        self.rewards = {
            r.title: Pool(reward_role(r.title), patience_seconds=patience, start_seconds=start)
            for r in run.rewards_for("evaluate")
        }
        self._titles = {s: [r.title for r in run.rewards_for(s)] for s in ("train", "evaluate")}
        self.queue = 0
        """Units ordered and not finished."""
        self.handled_bytes = 0
        self.samples = 0
        """Produced and scored; what is made once more after a learner's death counts once."""
        self._made: dict[tuple[str, int], set[UnitKey]] = {}
        """Tag of weights -> units that were made under them; of the last tags, those that may come
        again."""
        self._tags = 2 * (run.checkpoint.every + run.runtime.max_staleness + 2)
        self._worked: defaultdict[Role, float] = defaultdict(float)
        self._holds: dict[ActorHandle, tuple[str, int]] = {}
        """Rollout worker -> tag of the weights it was last sent: they travel once, not with every
        unit."""

    def pools(self) -> dict[Role, Pool]:
        """Role -> pool."""
        return {p.role: p for p in (self.rollouts, *self.rewards.values())}

    def count(self, message: Any) -> None:
        """Adds a message's size to what the coordinator has handled."""
        self.handled_bytes += len(pickle.dumps(message))

    async def unit(self, unit: Unit, tag: tuple[str, int], weights: ray.ObjectRef) -> UnitResult:
        """Produced and scored. What lay on a lost node between the two is produced again."""
        self.queue += 1
        try:
            # a trajectory that is lost before it is scored is made again
            for attempt in range(self._runtime.max_attempts):
                refs, rollout_seconds = await self._produced(unit, tag, weights)
                try:
                    raw, reward_seconds = await self._scored(unit, refs[1])
                except ObjectGone:
                    self._again(ROLLOUT)
                    if attempt + 1 == self._runtime.max_attempts:
                        raise
                    continue
                break
            self._gauges.count("rlalign_units_total", stream=unit.key.stream)
            self._count_samples(unit, tag)
        finally:
            self.queue -= 1
        return UnitResult(
            raw=raw, seconds={"rollout": rollout_seconds, "reward": reward_seconds}, refs=refs
        )

    def _count_samples(self, unit: Unit, tag: tuple[str, int]) -> None:
        made = self._made.setdefault(tag, set())
        if unit.key not in made:
            made.add(unit.key)
            self.samples += len(unit.prompts)
            self._gauges.count("rlalign_samples_total", len(unit.prompts))
        while len(self._made) > self._tags:
            del self._made[next(iter(self._made))]

    def _work(self, role: Role, unit: Unit, seconds: float) -> None:
        if unit.key.stream == "train":
            self._worked[role] += seconds

    def worked(self) -> dict[Role, float]:
        """Role -> seconds that each of its workers spent on rounds' units since this was last
        asked."""
        worked = self._worked
        self._worked = defaultdict(float)
        return {
            role: worked[role] / max(pool.state().ready, 1) for role, pool in self.pools().items()
        }

    async def _produced(
        self, unit: Unit, tag: tuple[str, int], weights: ray.ObjectRef
    ) -> tuple[tuple[ray.ObjectRef, ray.ObjectRef], float]:
        async def ask(actor: ActorHandle, *given: ray.ObjectRef) -> Any:
            self._holds[actor] = tag
            refs: list[ray.ObjectRef] = list(actor.produce.remote((unit, tag), *given))
            trajectory, media, facts = refs
            return (trajectory, media), await self.rollouts.answer(
                actor, facts, self._runtime.unit_timeout_seconds
            )

        async def call(actor: ActorHandle) -> Any:
            # calls of one actor are carried out in order; one that was restarted meanwhile says
            # that it has no weights
            given = () if self._holds.get(actor) == tag else (weights,)
            refs, facts = await ask(actor, *given)
            return (refs, facts) if facts else await ask(actor, weights)

        refs, facts = await call_with_retries(
            f"unit {unit.key}", self.rollouts, call, self._runtime, lambda: self._again(ROLLOUT)
        )
        self.count(facts)
        self._gauges.observe("rlalign_unit_seconds", facts["seconds"])
        self._work(ROLLOUT, unit, facts["seconds"])
        return refs, facts["seconds"]

    async def _scored(
        self, unit: Unit, media: ray.ObjectRef
    ) -> tuple[dict[str, np.ndarray], float]:
        """(reward title -> raw scores, seconds of all of them)."""
        asked = [self._score(title, unit, media) for title in self._titles[unit.key.stream]]
        scored = await asyncio.gather(*asked) if len(asked) > 1 else [await one for one in asked]
        raw = {title: values for title, values, _ in scored}
        self.count(raw)
        return raw, sum(seconds for _, _, seconds in scored)

    async def _score(
        self, title: str, unit: Unit, media: ray.ObjectRef
    ) -> tuple[str, np.ndarray, float]:
        def again() -> None:
            self._again(reward_role(title))
            self._gauges.count("rlalign_reward_errors_total", reward=title)

        # each reward has a pool of its own
        pool = self.rewards[title]
        patience = self._runtime.unit_timeout_seconds

        def call(actor: ActorHandle) -> Any:
            return pool.answer(
                actor, actor.score.remote(media, unit.prompts, str(unit.key)), patience
            )

        values, seconds = await call_with_retries(
            f"reward {title} of unit {unit.key}", pool, call, self._runtime, again
        )

        # what the reward cost
        self._work(pool.role, unit, seconds)
        self._gauges.observe("rlalign_reward_seconds", seconds, reward=title)
        self._gauges.count(
            "rlalign_reward_errors_total", float(np.isnan(values).sum()), reward=title
        )
        return title, values, seconds

    def _again(self, role: Role) -> None:
        self._gauges.count("rlalign_units_retried_total", role=role.label)
