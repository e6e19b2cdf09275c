"""A real fleet and coordinator before workers that only pretend: spares, and counts that a
coordinator's death leaves alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlalign.runtime.roles import ROLLOUT, Role, reward_role
from tests.runs import small_run

pytestmark = pytest.mark.ray


def fleet_of(run: Any, loaded: Path) -> Any:
    """The run's fleet; a reward worker that starts again loads until the file ``loaded`` is
    there."""
    import ray

    from rlalign.runtime.actors import RESTART, actor_name
    from rlalign.runtime.training.fleet import Fleet

    class Pretender:
        def __init__(self, role: Role) -> None:
            again = ray.get_runtime_context().was_current_actor_reconstructed
            while again and role != ROLLOUT and not loaded.exists():
                time.sleep(0.02)

        def ping(self) -> str:
            return "pong"

        def process_id(self) -> int:
            return os.getpid()

        def do(self, work: Any, tag: Any, *manifests: Any) -> tuple[Any, Any, Any]:
            media = np.zeros((len(work.unit.prompts), 1, 3, 8, 8), np.uint8)
            return None, media, ({}, "")

        def score(self, media: Any, prompts: Sequence[str], *_: Any) -> tuple[Any, float]:
            return np.zeros(len(prompts), np.float32), 0.0

    class PretendedFleet(Fleet):
        def _worker(self, role: Role, number: int) -> Any:
            kind: Any = ray.remote(num_cpus=0, **RESTART)(Pretender)
            return kind.options(name=actor_name(self.owner, role, number)).remote(role)

    return PretendedFleet(run, places_are_cores=True)


def until(true: Callable[[], Any]) -> Any:
    """Waits for it, however busy the machine is; the test's own time limit ends a hang."""
    while not (found := true()):
        time.sleep(0.05)
    return found


@pytest.mark.promise
def test_a_spare_takes_over_at_once_and_no_count_is_lost(ray_cluster: None, tmp_path: Path) -> None:
    """A round goes on while the one that was killed still loads."""
    import ray

    run = small_run(
        "rewards=[{name: shapes}]", "runtime.reward.workers=1", "runtime.reward.spares=1"
    )
    fleet = fleet_of(run, tmp_path / "loaded")
    role, units = reward_role("shapes"), run.prompts.units(run.seed, 1, run.plan)

    def standing() -> Any:
        return fleet.reconcile()

    def pool() -> Any:
        return (found := standing()) and found.pools[role]

    def one_round(learner: str) -> None:
        have = 0
        ray.get(fleet.coordinator.begin.remote(learner))
        ray.get(fleet.coordinator.order.remote(learner, 1, units, ("current", 0), [ray.put({})]))
        while have < len(units):
            have += len(ray.get(fleet.coordinator.gather.remote(learner, 1, have, 1)))

    assert fleet.size(role) == 2
    assert fleet.size(ROLLOUT) == run.runtime.rollout.workers
    until(lambda: pool() and pool().ready == 2)
    one_round("warm")
    os.kill(ray.get(fleet._members[role][0].process_id.remote()), signal.SIGKILL)
    one_round("after the death")
    (tmp_path / "loaded").touch()
    until(lambda: pool().restarts == 1 and pool().ready == 2)
    before = standing()
    assert before.samples == run.samples_per_round, "the second learner made the same samples"

    os.kill(ray.get(fleet.coordinator.process_id.remote()), signal.SIGKILL)
    after = until(lambda: (found := standing()) and found.epoch != before.epoch and found)
    assert after.pools[role].restarts == 1
    assert (after.samples, after.handled_bytes) == (before.samples, before.handled_bytes)
    fleet.end()
