"""Hours of nodes add up over drivers, and Ray is asked for what drains and who is where."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from rlalign.alignment import control
from rlalign.runtime.training.nodes import LAST_SECONDS, NodeHours, NodeKind, Nodes

SPOT = NodeKind(group="spot", market="spot", cpus=8.0, gpus=1.0)
HEAD = NodeKind(cpus=2.0)


def test_hours_are_those_of_nodes_and_of_what_these_have() -> None:
    hours = NodeHours()
    hours.add([SPOT, SPOT, HEAD], 1800.0)
    hours.add([HEAD], 1800.0)
    assert hours.totals() == {"hours": 2.0, "cpu_hours": 10.0, "gpu_hours": 1.0}
    assert NodeHours().totals() == {"hours": 0, "cpu_hours": 0, "gpu_hours": 0}


def test_a_driver_counts_on_from_what_the_last_one_said(tmp_path: Path) -> None:
    """Also where a run in one process lay between the two."""
    first = Nodes.after({})
    first.hours.add([SPOT], 3600.0)
    first.drained = 2
    control.Status(tmp_path, 4, name="x").write(nodes=first.report())
    control.Status(tmp_path, 4, name="x").write(state="running")
    second = Nodes.after(control.Status(tmp_path, 4, name="x").nodes)
    second.hours.add([SPOT, HEAD], 3600.0)
    assert second.facts() == {
        "nodes/used": 0,
        "nodes/draining": 0,
        "nodes/drained": 2,
        "nodes/hours": 3.0,
        "nodes/cpu_hours": 18.0,
        "nodes/gpu_hours": 2.0,
    }
    assert json.loads(json.dumps(second.report()))["kinds"][0] == {
        "group": "spot",
        "market": "spot",
        "cpus": 8.0,
        "gpus": 1.0,
        "hours": 2.0,
    }


def test_a_kind_is_what_labels_and_resources_say() -> None:
    labels = {"ray.io/node-group": "spot", "ray.io/market-type": "spot", "ray.io/node-id": "1"}
    resources = {"CPU": 8.0, "GPU": 1.0, "memory": 1e9}
    assert NodeKind.of({"Labels": labels, "Resources": resources}) == SPOT
    assert NodeKind.of({"Labels": None, "Resources": {"CPU": 2.0}}) == HEAD


@pytest.mark.ray
def test_a_survey_finds_actors_and_counts_the_time_between_two(ray_cluster: None) -> None:
    import ray

    class Anyone:
        def ping(self) -> str:
            return "pong"

    actor = ray.remote(num_cpus=0)(Anyone).remote()
    ray.get(actor.ping.remote())
    nodes = Nodes()
    nodes.look()
    here = ray.get_runtime_context().get_node_id()
    assert nodes.home(actor) == here
    assert nodes.held()[here] >= 1
    assert list(nodes.used) == [here]
    assert nodes.seconds_left(actor) is None, "it stays"
    assert nodes.facts()["nodes/hours"] == 0

    before = time.monotonic()
    nodes._surveyed = before - 3600  # as if it had been so long ago
    nodes.survey()
    assert nodes.facts()["nodes/hours"] == pytest.approx(1.0, abs=1e-3)
    nodes.draining = {here: math.inf}
    assert nodes.seconds_left(actor) == math.inf
    nodes.draining = {here: time.time() + 100 + LAST_SECONDS}
    assert nodes.seconds_left(actor) == pytest.approx(100, abs=5)
    ray.kill(actor)


def test_a_node_that_was_left_before_it_was_looked_at_has_drained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A learner hears of the notice by itself, and may be gone when the driver asks."""

    class Left(Nodes):
        def survey(self) -> None:
            self.used = {}

    monkeypatch.setattr(
        "rlalign.runtime.training.nodes.draining_nodes", lambda: {"mine": math.inf, "other": 9.0}
    )
    nodes = Left(used={"mine": NodeKind()})
    nodes.look()
    nodes.look()
    assert nodes.drained == 1
