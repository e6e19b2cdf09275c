"""One unit's way: denoised by a worker of the rollout pool, scored by one of each reward's pool,
tried again where one dies.

Not an actor's methods but a plain object's: Ray wraps every method of an actor for tracing, private
ones too, and this is where a coordinator spends its time.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from rlalign.config import Run
from rlalign.core.records import Unit, UnitKey
from rlalign.engine import WorkResult
from rlalign.engine.pieces import Rollout
from rlalign.runtime.engine import Pools
from rlalign.runtime.gauges import Gauges
from rlalign.runtime.roles import ROLLOUT, Role, reward_role
from rlalign.runtime.weights import WeightsRef


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """What the coordinator knows of a finished unit."""

    raw: Mapping[str, np.ndarray]
    """Reward title -> (B,) float32."""
    seconds: Mapping[str, float]
    refs: tuple[ray.ObjectRef, ray.ObjectRef]
    """Trajectory and samples."""


class Production:
    """The pools of a run, and what passes through them."""

    def __init__(self, run: Run, gauges: Gauges) -> None:
        self._gauges = gauges

        # one pool for rollouts, and one for each reward
        rewards = run.rewards_for("evaluate")
        self.pools = Pools(
            run.runtime,
            [ROLLOUT, *(reward_role(r.title) for r in rewards)],
            again=self._count_retry,
            units_per_call={r.title: r.units_per_call for r in rewards},
        )
        self._titles = {s: [r.title for r in run.rewards_for(s)] for s in ("train", "evaluate")}
        self._spaces = {s: run.spaces_for(s) for s in ("train", "evaluate")}
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
        self._processes = run.runtime.rollout.shard
        """Of a rollout worker, each of which makes units."""

    def count(self, message: Any) -> None:
        """Adds a message's size to what the coordinator has handled."""
        self.handled_bytes += len(pickle.dumps(message))

    async def unit(
        self,
        unit: Unit,
        tag: tuple[str, int],
        manifests: Sequence[ray.ObjectRef],
        reward: WeightsRef | None = None,
    ) -> UnitResult:
        """Produced under the weights of the manifests and scored, with ``reward`` the weights of
        the one that the run fits anew. What lay on a lost node between the two is produced
        again."""

        async def scored(parts: Sequence[ray.ObjectRef], done: WorkResult) -> UnitResult:
            self.count((vars(done.cost), done.reason))
            self._note(ROLLOUT, unit, done.cost.seconds)
            raw, seconds = await self._scored(unit, parts[1], reward)
            return UnitResult(
                raw=raw,
                seconds={"rollout": done.cost.seconds, **seconds},
                refs=(parts[0], parts[1]),
            )

        self.queue += 1
        try:
            result = await self.pools.do(
                f"unit {unit.key}",
                Rollout(unit=unit, version=tag[1], spaces=self._spaces[unit.key.stream]),
                scored,
                WeightsRef(tag=tag, manifests=tuple(manifests)),
            )
            self._gauges.count("rlalign_units_total", stream=unit.key.stream)
            self._count_samples(unit, tag)
        finally:
            self.queue -= 1
        return result

    def _count_samples(self, unit: Unit, tag: tuple[str, int]) -> None:
        made = self._made.setdefault(tag, set())
        if unit.key not in made:
            made.add(unit.key)
            self.samples += len(unit.prompts)
            self._gauges.count("rlalign_samples_total", len(unit.prompts))
        while len(self._made) > self._tags:
            del self._made[next(iter(self._made))]

    def worked(self) -> dict[Role, float]:
        """Role -> seconds that each of its processes spent on rounds' units since this was last
        asked."""
        worked = self._worked
        self._worked = defaultdict(float)
        count = {role: max(pool.state().ready, 1) for role, pool in self.pools.items()}
        count[ROLLOUT] *= self._processes
        return {role: worked[role] / count[role] for role in self.pools}

    async def _scored(
        self, unit: Unit, samples: ray.ObjectRef, reward: WeightsRef | None
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """(reward title -> raw scores, "reward" -> seconds of all of them, "reward/TITLE" -> of
        one)."""
        titles = self._titles[unit.key.stream]
        answers = await self.pools.score(
            titles, samples, unit.prompts, unit=str(unit.key), weights=reward
        )
        for title, answer in answers.items():
            self._note(reward_role(title), unit, answer.seconds)
            missing = float(np.isnan(answer.score_B).sum())
            self._gauges.count("rlalign_reward_errors_total", missing, reward=title)
        raw = {title: answer.score_B for title, answer in answers.items()}
        self.count(raw)
        seconds = {f"reward/{title}": answer.seconds for title, answer in answers.items()}
        return raw, {"reward": sum(seconds.values()), **seconds}

    def _note(self, role: Role, unit: Unit, seconds: float) -> None:
        """What a unit cost a worker."""
        if unit.key.stream == "train":
            self._worked[role] += seconds
        if role.reward:
            self._gauges.observe("rlalign_reward_seconds", seconds, reward=role.reward)
        else:
            self._gauges.observe("rlalign_unit_seconds", seconds)

    def _count_retry(self, role: Role) -> None:
        self._gauges.count("rlalign_units_retried_total", role=role.label)
        if role.reward:
            self._gauges.count("rlalign_reward_errors_total", reward=role.reward)
