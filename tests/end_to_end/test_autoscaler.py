"""One run on Ray's own autoscaling cluster: it grows from one rollout worker to several and back,
loses spot nodes with notice, its learner's among them; the result does not change.

    make chaos

Every worker has a node of its own, which the autoscaler starts because the worker waits for it, and
ends when nothing is on it any more. Nodes are killed when the notice is over; Ray has its own
patience with them (15 s), for which nobody waits. Prints how long each step took.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment import control
from rlalign.alignment.loop import train_local
from tests.runs import assert_same_run, points_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NOTICE_SECONDS = 10.0
MOST = 3
SETTINGS = (
    "rounds=100000",
    "evaluate.every=0",
    "checkpoint.every=5",
    "runtime.rollout.workers=1",
    "runtime.rollout.resources={rollout: 1}",
    "runtime.learner.resources={learner: 1}",
)
GROUPS = {
    "rollout": {
        "resources": {"CPU": 1, "rollout": 1},
        "labels": {"ray.io/market-type": "spot"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": MOST + 1,
    },
    "learner": {
        "resources": {"CPU": 1, "learner": 1},
        "labels": {"ray.io/market-type": "spot"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    },
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    from rlalign.runtime.cluster import prepare_environment
    from tests.spot import LocalAutoscaling

    prepare_environment("auto")
    found = LocalAutoscaling({"CPU": 2}, GROUPS, tmp_path)
    try:
        found.start()
        yield found
    finally:
        import ray

        ray.shutdown()
        found.shutdown()


class Operator:
    """Whoever scales the run and takes its nodes away, and watches."""

    def __init__(self, address: str, folder: Path) -> None:
        self.lines: list[dict[str, Any]] = []
        self.errors: list[BaseException] = []
        self.took: dict[str, float] = {}
        self._address, self._folder = address, folder

    def until(self, what: str, true: Callable[[], Any]) -> Any:
        """Waits for it and notes the seconds; the test's own time limit ends a hang."""
        start = time.monotonic()
        while not (found := true()):
            assert not self.errors, f"the run ended: {self.errors[0]}"
            time.sleep(0.05)
        self.took[what] = time.monotonic() - start
        return found

    def rounds(self, what: str, count: int = 2) -> None:
        """Waits for so many more rounds."""
        have = len(self.lines)
        self.until(what, lambda: len(self.lines) >= have + count)

    def groups(self) -> Counter[str]:
        """How many nodes of each group there are."""
        import ray

        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        names = [[name for name in ("rollout", "learner") if name in one] for one in found]
        return Counter((name or ["head"])[0] for name in names)

    def status(self) -> dict[str, Any]:
        return control.status_of(self._folder)

    def is_gone(self, node: dict[str, Any]) -> bool:
        """Whether Ray has missed a node."""
        import ray

        return not any(one["Alive"] for one in ray.nodes() if one["NodeID"] == node["NodeID"])

    def home(self, actor: str) -> dict[str, Any] | None:
        """The node of the first living actor whose name or class begins so."""
        import ray
        from ray._private import state

        alive = state.actors(actor_state_name="ALIVE").values()
        homes = {
            one["Name"].partition("/")[2] or one["ActorClassName"]: one["Address"]["NodeID"]
            for one in alive
        }
        home = next((homes[name] for name in sorted(homes) if name.startswith(actor)), None)
        return next((node for node in ray.nodes() if node["NodeID"] == home), None)

    def has_moved(self, actor: str, from_node: dict[str, Any]) -> bool:
        """Whether an actor lives on another node than that."""
        home = self.home(actor)
        return home is not None and home["NodeID"] != from_node["NodeID"]

    def drained(self) -> int:
        """How many nodes of the run had to go."""
        return self.status().get("nodes", {}).get("drained", 0)

    def drain(self, actor: str) -> dict[str, Any]:
        """Gives notice to the node of an actor, and takes it away when the time is over."""
        from tests.spot import give_notice, take_away

        node = self.until(f"{actor}: found", lambda: self.home(actor))
        give_notice(self._address, node["NodeID"], NOTICE_SECONDS)
        threading.Timer(NOTICE_SECONDS, take_away, [node]).start()
        return node


@pytest.mark.timeout(1200)
def test_it_grows_shrinks_and_loses_spot_nodes(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlalign.runtime import train_on_ray

    folder, run = tmp_path / "run", points_run(*SETTINGS)
    operator = Operator(cluster.address, folder)

    def record(line: dict[str, Any]) -> None:
        if "round" in line:
            operator.lines.append(line)

    def work() -> None:
        try:
            train_on_ray(run, folder, resume=False, on_record=record, address=cluster.address)
        except BaseException as error:  # noqa: BLE001 -- told to the test's thread
            operator.errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    operator.rounds("from nothing to two rounds")
    assert operator.groups() == {"head": 1, "rollout": 1, "learner": 1}

    # it grows: workers that wait are demand
    def is_whole() -> bool:
        pool = operator.status()["pools"]["rollout"]
        return pool["ready"] == pool["wanted"] == MOST

    control.ask(folder, rollout_workers=MOST)
    operator.until(f"1 to {MOST} rollout workers", is_whole)
    assert operator.groups()["rollout"] == MOST
    operator.rounds("two rounds with all of them")

    # a rollout's node is taken away with notice; the autoscaler finds another one
    gone = operator.drain("rollout")
    operator.until("noticed that a rollout's node drains", lambda: operator.drained() == 1)
    operator.until("its worker has another node", lambda: is_whole() and operator.is_gone(gone))
    operator.rounds("two rounds after that")

    # so is the learner's
    gone = operator.drain("RayTrainWorker")
    operator.until("noticed that the learner's node drains", lambda: operator.drained() == 2)
    operator.until("the learner has another", lambda: operator.has_moved("RayTrainWorker", gone))
    operator.rounds("two rounds after that, too")

    # what watches over the learner's node stays with the driver, and keeps no other from going
    watched_from = operator.until("it is watched", lambda: operator.home("PreemptionWatcher"))
    assert not {"rollout", "learner"} & set(watched_from["Resources"])

    # it shrinks: nodes on which nothing is left go
    control.ask(folder, rollout_workers=1)
    operator.until(f"{MOST} to 1 nodes for rollouts", lambda: operator.groups()["rollout"] == 1)
    operator.rounds("two rounds with one")
    control.ask(folder, stop=True)
    thread.join(timeout=600)
    assert not operator.errors and not thread.is_alive(), operator.errors

    state = operator.status()
    assert state["state"] == "stopped"
    assert state["nodes"]["hours"] > 0
    assert {row["market"] for row in state["nodes"]["kinds"]} == {"", "spot"}
    with capsys.disabled():
        print(f"\n{len(operator.lines)} rounds made, {state['round']} of them different")
        for what, seconds in operator.took.items():
            print(f"{seconds:6.1f} s  {what}")
        print(f"{state['nodes']['hours']:.2f} node hours")
    longer = points_run(*SETTINGS, f"rounds={state['round'] + 2}")
    train_local(longer, folder, resume=True, on_record=lambda _: None)
    train_local(longer, tmp_path / "undisturbed", resume=False, on_record=lambda _: None)
    assert_same_run(folder, tmp_path / "undisturbed")
