"""What a run reserves, and the refusal of what cannot fit."""

from __future__ import annotations

import pytest

from rlalign.registry import UserError
from rlalign.runtime import cluster, placement
from tests.runs import small_run


def test_needed_resources_are_counted() -> None:
    run = small_run(
        "runtime.rollout_workers=3",
        "runtime.reward_workers=2",
        "runtime.learner_workers=2",
        "runtime.reward_gpus=0.25",
        "evaluate.rewards=[{name: jpeg, label: size}]",
    )
    # 3 rollouts of 1, 2 workers for each of 3 rewards of 0.25, 2 learners of 1
    assert placement.needed(run, "CPU") == pytest.approx(3 + 6 * 0.25 + 2)
    assert placement.needed(run, "GPU") == pytest.approx(6 * 0.25)


@pytest.mark.ray
def test_a_run_that_is_larger_than_the_cluster_is_refused(ray_cluster: None) -> None:
    with pytest.raises(
        UserError,
        match=r"13 rollout workers, .* found no place on the cluster at here: the run reserves 21\.5 CPU and there are 8; "
        r"lower runtime\.rollout_workers",
    ):
        cluster.refuse_what_cannot_fit(small_run("runtime.rollout_workers=20"), "here")
    with pytest.raises(
        UserError,
        match="one needs 1 GPU and no node has more than 0; lower the runtime setting",
    ):
        cluster.refuse_what_cannot_fit(small_run("runtime.rollout_gpus=1"), "here")
    cluster.refuse_what_cannot_fit(small_run(), "here")


@pytest.mark.ray
def test_a_busy_cluster_is_refused(ray_cluster: None) -> None:
    import ray

    from rlalign.runtime.workers import Worker

    holder = ray.remote(num_cpus=7)(Worker).remote()
    ray.get(holder.ping.remote())
    with pytest.raises(UserError, match=r"reserves 3\.5 CPU and there are 8, of which others hold 7; wait for"):
        cluster.refuse_what_cannot_fit(small_run(), "here")
    ray.kill(holder)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", r"--address 127\.0\.0\.1:1: no Ray cluster answers there \(.*refused\); is it started"),
        ("somewhere", "--address must be HOST:PORT or auto, got 'somewhere'"),
    ],
)
def test_an_address_where_no_ray_is(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cluster.connect(small_run(), address)
