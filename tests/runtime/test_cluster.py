"""What a run reserves, and the refusal of what cannot fit."""

from __future__ import annotations

import contextlib
import json

import pytest

from rlalign.config import Run
from rlalign.core.registry import UserError
from rlalign.networks import devices
from rlalign.runtime import cluster, placement
from rlalign.runtime.reservation import run_bundles
from tests.runs import small_run


def connect(run: Run, address: str | None) -> str:
    return cluster.connect(run_bundles(run), run.runtime.device, address)


def test_needed_resources_are_counted() -> None:
    run = small_run(
        "runtime.rollout.workers=3",
        "runtime.reward.workers=2",
        "runtime.learner.workers=2",
        "runtime.reward.gpus=0.25",
        "evaluate.rewards=[{name: jpeg, label: size}]",
    )
    # 3 rollouts of 1, 2 workers for each of 3 rewards of 0.25, 2 learners of 1
    assert placement.needed(run_bundles(run), "CPU") == pytest.approx(3 + 6 * 0.25 + 2)
    assert placement.needed(run_bundles(run), "GPU") == pytest.approx(6 * 0.25)


@pytest.mark.promise
@pytest.mark.ray
def test_a_run_that_is_larger_than_the_cluster_is_refused(ray_cluster: None) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"13 rollout workers, .* found no place on the cluster at here: the run reserves 21\.5"
            r" CPU and there are 8; "
            r"lower runtime\.rollout\.workers"
        ),
    ):
        cluster.refuse_what_cannot_fit(run_bundles(small_run("runtime.rollout.workers=20")), "here")
    with pytest.raises(
        UserError,
        match="one needs 1 GPU and no node has more than 0; lower the runtime setting",
    ):
        cluster.refuse_what_cannot_fit(run_bundles(small_run("runtime.rollout.gpus=1")), "here")
    cluster.refuse_what_cannot_fit(run_bundles(small_run()), "here")


@pytest.mark.ray
def test_a_group_that_scales_from_zero_counts_with_labels_that_ray_does_not_tell(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's state says what a group's nodes have, and nothing of their labels."""
    from ray._private.state import state
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    run = small_run(
        "runtime.rollout.gpus=0.5", "runtime.rollout.labels={pool: fast}", "runtime.device=cuda"
    )
    with pytest.raises(
        UserError,
        match="2 rollout workers found no place on the cluster at here: no node has the labels",
    ):
        cluster.refuse_what_cannot_fit(run_bundles(run), "here")
    group = NodeGroupConfig(name="gpus", resources={"CPU": 4, "GPU": 1}, max_count=2)
    monkeypatch.setattr(
        state, "get_cluster_config", lambda: ClusterConfig(node_group_configs=[group])
    )
    cluster.refuse_what_cannot_fit(run_bundles(run), "here")
    nodes = placement.cluster_nodes()
    assert placement.place(run_bundles(run), nodes) == []
    assert (
        placement.table(nodes)["to be added: gpus +1"]
        == "2 rollout (has 4 CPU, 1 GPU), if it comes with the labels pool=fast, of which Ray does"
        " not tell"
    )
    with pytest.raises(UserError, match="one needs 2 GPU and no node has more than 1"):
        cluster.refuse_what_cannot_fit(run_bundles(small_run("runtime.rollout.gpus=2")), "here")


@pytest.mark.ray
@pytest.mark.parametrize(
    ("v2", "kind", "is_there"),
    [(b"0", "node_15f571c0", False), (b"0", "rollout", True), (b"1", "node_15f571c0", True)],
)
def test_an_autoscaler_that_does_not_say_what_it_may_add_is_waited_for(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, v2: bytes, kind: str, is_there: bool
) -> None:
    """As Ray's own does not; a Ray without one has a monitor, whose kinds of nodes are nodes."""
    status = json.dumps({"autoscaler_report": {"active_nodes": {kind: 1}}}).encode()
    monkeypatch.setattr(
        "ray.experimental.internal_kv._internal_kv_get",
        lambda key, namespace=None: v2 if namespace else status,
    )
    said: list[str] = []
    bundles = run_bundles(small_run("runtime.rollout.workers=20"))
    with contextlib.nullcontext() if is_there else pytest.raises(UserError):
        cluster.refuse_what_cannot_fit(bundles, "here", said.append)
    assert len(said) == is_there
    assert all("the cluster's autoscaler may add one, and is waited for" in one for one in said)


@pytest.mark.slow
@pytest.mark.ray
def test_a_busy_cluster_is_refused(ray_cluster: None) -> None:
    import ray

    from rlalign.runtime.workers import Worker

    holder = ray.remote(num_cpus=7)(Worker).remote()
    ray.get(holder.ping.remote())
    with pytest.raises(
        UserError, match=r"reserves 3\.5 CPU and there are 8, of which others hold 7; wait for"
    ):
        cluster.refuse_what_cannot_fit(run_bundles(small_run()), "here")
    ray.kill(holder)


@pytest.mark.ray
def test_a_mistake_on_one_of_several_nodes_says_on_which(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from rlalign.runtime.workers import naming_the_node

    def mistake() -> str:
        with pytest.raises(UserError, match="^there is no /data/model") as told, naming_the_node():
            raise UserError("there is no /data/model")
        return str(told.value)

    [node] = ray.nodes()
    assert mistake() == "there is no /data/model"
    monkeypatch.setattr(ray, "nodes", lambda: [node, {**node, "Alive": False}])
    assert mistake() == "there is no /data/model"
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    assert mistake() == "there is no /data/model (on node 127.0.0.1 of the cluster)"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, on which nobody may start Ray."""
    import ray

    monkeypatch.setattr(devices, "gpus", lambda: 0)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["runtime.rollout.gpus=1"],
            r"runtime: 2 rollout workers found no place on this machine: one needs 1 GPU and no"
            r" node has more than 0; "
            r"lower the runtime setting, or join a cluster with --address",
        ),
        (["runtime.reward.gpus=0.25"], r"1 reward shapes worker, .*one needs 0\.25 GPU"),
        (
            ["runtime.rollout.labels={zone: a}", "runtime.learner.labels={zone: b}"],
            (
                r"2 rollout workers found no place on this machine: no node has the labels zone=a;"
                r" mend runtime\.\*\.labels, or join"
            ),
        ),
        (
            ["runtime.device=cuda"],
            (
                r"runtime\.rollout\.gpus must be > 0 on Ray where runtime\.device is cuda, got 0; a"
                r" share"
            ),
        ),
        (
            ["runtime.device=cuda", "runtime.rollout.gpus=1"],
            r"runtime\.learner\.gpus must be > 0 on Ray",
        ),
        (
            ["runtime.device=cuda:1", "runtime.rollout.gpus=1"],
            r"runtime\.device must be cpu or cuda on Ray, .* got cuda:1",
        ),
    ],
)
def test_a_local_ray_is_not_started_for_what_it_cannot_hold(
    no_gpu: None, settings: list[str], message: str
) -> None:
    """CPUs, custom resources and labels are given to it as asked; GPUs are not made up."""
    with pytest.raises(UserError, match=message):
        connect(small_run(*settings), None)


def test_a_local_ray_has_what_is_pretended_and_the_gpus_that_are_there() -> None:
    run = small_run(
        "runtime.rollout.workers=6",
        "runtime.rollout.resources={fast: 0.5}",
        "runtime.learner.labels={zone: 'in(a,b)'}",
    )
    here = placement.this_machine(run_bundles(run), 3)
    assert here.total["GPU"] == 3 and here.total["fast"] == 3 and here.total["CPU"] >= 8
    cluster.refuse_what_is_not_here(run_bundles(run), here)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "127.0.0.1:1",
            r"--address 127\.0\.0\.1:1: no Ray cluster answers there \(.*refused\); is it started",
        ),
        ("somewhere", "--address must be HOST:PORT or auto, got 'somewhere'"),
    ],
)
def test_an_address_where_no_ray_is(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        connect(small_run(), address)
