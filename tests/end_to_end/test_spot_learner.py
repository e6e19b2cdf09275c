"""A learner whose node is taken away with notice goes on on another one, from the round it was in;
the run ends as one that nobody disturbed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment import control
from rlalign.alignment.loop import train_local
from tests.runs import assert_same_run, points_run, quiet

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = (
    "rounds=100000",
    "evaluate.every=0",
    "checkpoint.every=100000",
    "runtime.max_attempts=1",
    "runtime.learner.resources={learner: 1}",
)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head, and two nodes for the learner, with room for whatever else Ray puts there."""
    from rlalign.runtime.cluster import prepare_environment

    prepare_environment("auto")
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 3, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        found.add_node(num_cpus=4, resources={"learner": 1})
    yield found
    ray.shutdown()
    found.shutdown()


def learner_home() -> str | None:
    """The node of the learner that works, by Ray's id."""
    from ray._private import state

    alive = state.actors(actor_state_name="ALIVE").values()
    homes = [a["Address"]["NodeID"] for a in alive if a["ActorClassName"] == "RayTrainWorker"]
    return homes[0] if homes else None


def test_it_goes_on_elsewhere_without_a_round_done_twice(cluster: Any, tmp_path: Path) -> None:
    """No checkpoint is due: the only one is that of the learner which leaves."""
    from rlalign.runtime import train_on_ray
    from tests.spot import give_notice

    folder, run = tmp_path / "run", points_run(*SETTINGS)
    rounds: list[int] = []
    notes: list[str] = []
    errors: list[BaseException] = []

    def record(line: dict[str, Any]) -> None:
        rounds.extend([line["round"]] if "round" in line else [])
        notes.extend([line["note"]] if "note" in line else [])

    def work() -> None:
        try:
            train_on_ray(run, folder, resume=False, on_record=record, address=cluster.address)
        except BaseException as error:  # noqa: BLE001 -- told to the test's thread
            errors.append(error)

    def until(true: Any) -> None:
        while not true():
            assert not errors, errors
            time.sleep(0.05)

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: len(rounds) >= 2)
    old = learner_home()
    assert old is not None
    give_notice(cluster.address, old, seconds=3600)
    until(lambda: learner_home() not in (None, old))
    have = len(rounds)
    until(lambda: len(rounds) >= have + 2)
    (node,) = [one for one in cluster.worker_nodes if one.node_id == old]
    cluster.remove_node(node, allow_graceful=False)
    control.ask(folder, stop=True)
    thread.join()
    assert not errors, errors
    assert rounds == list(range(1, len(rounds) + 1)), "no round was done twice"
    said = control.status_of(folder)
    assert (said["state"], said["nodes"]["drained"]) == ("stopped", 1)
    assert any("of the run's nodes will be taken away" in note for note in notes)
    longer = points_run(*SETTINGS, f"rounds={said['round'] + 2}", "checkpoint.every=100000")
    train_local(longer, folder, resume=True, on_record=quiet)
    train_local(longer, tmp_path / "whole", resume=False, on_record=quiet)
    assert_same_run(folder, tmp_path / "whole")
