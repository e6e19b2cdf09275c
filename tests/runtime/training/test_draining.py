"""A real fleet and coordinator on a cluster of two nodes, of which one drains and is then killed:
nobody waits for it, and nothing that was finished on it is made twice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlalign.runtime.roles import ROLLOUT, Role
from tests.runs import small_run

pytestmark = pytest.mark.ray

RUN = (
    "rewards=[{name: shapes}]",
    "prompts.per_round=8",
    "prompts.samples_per_prompt=1",
    "runtime.reward.workers=1",
    "runtime.max_attempts=1",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without places for rollouts, and a node with two; each test leaves one such node."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    found.add_node(num_cpus=2, resources={"place": 2})
    ray.init(found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


def fleet_of(run: Any, folder: Path) -> Any:
    """The run's fleet. A rollout worker writes down which unit it makes on which node; on a node
    of which ``folder`` has a file ``closed-NODE`` it works until that is gone."""
    import ray

    from rlalign.runtime.actors import RESTART, actor_name
    from rlalign.runtime.training.fleet import Fleet

    class Pretender:
        def ping(self) -> str:
            return "pong"

        def do(self, work: Any, tag: Any, tensors: Any = None) -> tuple[Any, Any, Any]:
            node = ray.get_runtime_context().get_node_id()
            with (folder / "made").open("a") as made:
                made.write(f"{work.unit.key} {node}\n")
            while (folder / f"closed-{node}").exists():
                time.sleep(0.02)
            media = np.zeros((len(work.unit.prompts), 1, 3, 512, 512), np.uint8)  # not inlined
            return None, {"media": media}, ({}, "")

        def score(self, media: Any, prompts: Sequence[str], *_: Any) -> tuple[Any, float]:
            return np.zeros(len(prompts), np.float32), 0.0

    class PretendedFleet(Fleet):
        def _worker(self, role: Role, number: int) -> Any:
            place = {"place": 1} if role == ROLLOUT else {}
            kind: Any = ray.remote(num_cpus=0, resources=place, **RESTART)(Pretender)
            return kind.options(name=actor_name(self.owner, role, number)).remote()

    return PretendedFleet(run, places_are_cores=True)


def until(true: Callable[[], Any]) -> Any:
    """Waits for it, however busy the machine is; the test's own time limit ends a hang."""
    while not (found := true()):
        time.sleep(0.05)
    return found


@pytest.mark.promise
def test_a_node_that_drains_is_left_and_then_killed(cluster: Any, tmp_path: Path) -> None:
    """One try is all that a unit has: none is lost with the node."""
    import ray
    from ray.experimental import get_object_locations

    from tests.spot import give_notice

    run = small_run(*RUN)
    fleet = fleet_of(run, tmp_path)
    (old,) = cluster.worker_nodes
    units = run.prompts.units(run.seed, 1, run.plan)
    closed = tmp_path / f"closed-{old.node_id}"
    closed.touch()

    def standing() -> Any:
        return fleet.reconcile()

    def made() -> list[tuple[str, str]]:
        lines = (tmp_path / "made").read_text().splitlines()
        return [(line.rpartition(" ")[0], line.rpartition(" ")[2]) for line in lines]

    # both workers are on the old node, and at work
    until(lambda: (now := standing()) and now.pools[ROLLOUT].ready == 2)
    ray.get(fleet.coordinator.begin.remote("learner"))
    order = fleet.coordinator.order
    ray.get(order.remote("learner", 1, units, ("current", 0), [ray.put({})]))
    until((tmp_path / "made").exists)
    until(lambda: len(made()) == 2)
    cluster.add_node(num_cpus=2, resources={"place": 2})

    # notice is given: others start elsewhere, and do all that had not been given out
    give_notice(cluster.address, old.node_id, seconds=3600)
    given_out = 2 * len(made())
    until(lambda: (now := standing()) and now.numbers[ROLLOUT] == (0, 1, 2, 3))
    assert fleet.nodes.drained == 1
    assert 3000 < fleet.nodes.seconds_left(fleet._leaving[ROLLOUT][0]) < 3600
    until(lambda: standing() and len(made()) == 2 + len(units) - given_out)

    # what runs on the node is finished there; then its workers end
    closed.unlink()
    have: list[Any] = []
    while len(have) < len(units):  # two learners: the coordinator keeps the ticket for the other
        some = ray.get(fleet.coordinator.gather.remote("learner", 1, len(have), 2))
        assert isinstance(some, list), some
        have += some
    assert sorted(unit for unit, _ in made()) == sorted(str(unit.key) for unit in units)
    assert [node for _, node in made()].count(old.node_id) == given_out
    until(lambda: (now := standing()) and now.numbers[ROLLOUT] == (2, 3))

    # what was made there is copied before the node is gone
    refs = [ref for _, result in have for ref in result.refs]
    until(
        lambda: (
            standing()
            and all(
                place["node_ids"] != [old.node_id]
                for place in get_object_locations(refs, 10_000).values()
            )
        )
    )
    cluster.remove_node(old, allow_graceful=False)
    assert sum(one["media"].shape[0] for one in ray.get(refs) if one) == len(units)
    now = until(standing)  # Ray may not reach the coordinator while it finds out who is gone
    assert now.pools[ROLLOUT].restarts == 0
    assert fleet.nodes.draining.get(old.node_id, math.inf) > 0
    fleet.end()


@pytest.mark.slow
def test_work_that_outlasts_the_notice_is_given_out_again(cluster: Any, tmp_path: Path) -> None:
    """The node itself hangs: it is not Ray that says so, and one try is still all that there is."""
    import ray

    from tests.spot import give_notice

    run = small_run(*RUN)
    fleet = fleet_of(run, tmp_path)
    (old,) = cluster.worker_nodes
    (tmp_path / f"closed-{old.node_id}").touch()
    units = run.prompts.units(run.seed, 1, run.plan)
    until(lambda: (now := fleet.reconcile()) and now.pools[ROLLOUT].ready == 2)
    ray.get(fleet.coordinator.begin.remote("learner"))
    order = fleet.coordinator.order
    ray.get(order.remote("learner", 1, units, ("current", 0), [ray.put({})]))
    until((tmp_path / "made").exists)
    cluster.add_node(num_cpus=2, resources={"place": 2})
    give_notice(cluster.address, old.node_id, seconds=5)
    have: list[Any] = []
    asked = fleet.coordinator.gather.remote("learner", 1, 0, 1)
    while len(have) < len(units):
        fleet.reconcile()
        if ray.wait([asked], timeout=0.2)[0]:
            some = ray.get(asked)
            assert isinstance(some, list), some
            have += some
            asked = fleet.coordinator.gather.remote("learner", 1, len(have), 1)
    fleet.end()
