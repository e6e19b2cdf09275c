"""Which node gets what, and what is said when something finds no place."""

from __future__ import annotations

from collections import Counter

import pytest

from rlalign.core.registry import UserError
from rlalign.runtime.placement import (
    Bundle,
    Node,
    custom,
    matches,
    place,
    pretended_labels,
    refuse,
    table,
    to_be_added,
)
from rlalign.runtime.reservation import run_bundles
from rlalign.runtime.roles import LEARNER, ROLLOUT, reward_role
from tests.runs import small_run


def node(
    title: str, labels: dict[str, str] | None = None, *, exists: bool = True, **has: float
) -> Node:
    return Node(title=title, free=dict(has), total=has, labels=labels or {}, exists=exists)


@pytest.mark.parametrize(
    ("value", "rule", "met"),
    [
        ("a", "a", True),
        ("a", "b", False),
        (None, "a", False),
        ("a", "!a", False),
        ("b", "!a", True),
        (None, "!a", True),
        ("b", "in(a, b)", True),
        ("c", "in(a,b)", False),
        ("c", "!in(a,b)", True),
        (None, "!in(a,b)", True),
    ],
)
def test_label_rules_are_rays(value: str | None, rule: str, met: bool) -> None:
    assert matches(value, rule) is met


def test_bundles_of_a_run_name_every_worker_with_its_own_needs() -> None:
    run = small_run(
        "runtime.rollout.workers=3",
        "runtime.rollout.gpus=0.75",
        "runtime.rollout.resources={rollout: 1}",
        "runtime.reward.gpus=0.25",
        "runtime.learner.labels={zone: a}",
    )
    found = run_bundles(run)
    assert Counter(b.role for b in found) == {
        LEARNER: 1,
        ROLLOUT: 3,
        reward_role("shapes"): 1,
        reward_role("jpeg"): 1,
    }
    rollout = next(b for b in found if b.role == ROLLOUT)
    assert rollout.needs == {"CPU": 1.0, "GPU": 0.75, "rollout": 1.0}
    assert next(b for b in found if b.role == LEARNER).labels == {"zone": "a"}
    assert custom(found) == {"rollout": 3.0}
    assert pretended_labels(found) == {"zone": "a"}


def test_each_process_of_a_rollout_worker_reserves_its_own() -> None:
    spread = (
        "policy={name: flux, path: some/flux, lora_rank: 2}",
        "plan={rule: flow_sde}",
        "runtime.rollout.workers=3",
        "runtime.rollout.shard=4",
        "runtime.rollout.gpus=1",
    )
    found = [b for b in run_bundles(small_run(*spread)) if b.role == ROLLOUT]
    assert len(found) == 12
    assert all(bundle.needs == {"CPU": 1.0, "GPU": 1.0} for bundle in found)


def test_spares_of_a_reward_are_reserved_too() -> None:
    found = run_bundles(small_run("runtime.reward.workers=2", "runtime.reward.spares=1"))
    assert Counter(b.role for b in found) == {
        LEARNER: 1,
        ROLLOUT: 2,
        reward_role("shapes"): 3,
        reward_role("jpeg"): 3,
    }


def test_shares_of_a_gpu_are_colocated() -> None:
    """Three quarters and a quarter go onto one GPU, twice: two GPUs hold two rollouts and two
    rewards."""
    run = small_run(
        "runtime.rollout.workers=2", "runtime.rollout.gpus=0.75", "runtime.reward.gpus=0.25"
    )
    nodes = [node("one", CPU=8, GPU=2)]
    assert place(run_bundles(run), nodes) == []
    assert nodes[0].free["GPU"] == pytest.approx(0.0)


def test_custom_resources_and_labels_separate_the_pools() -> None:
    run = small_run(
        "runtime.rollout.resources={rollout: 1}",
        "runtime.reward.resources={reward: 1}",
        "runtime.learner.labels={zone: a}",
    )
    nodes = [
        node("r", CPU=4, rollout=2),
        node("s", CPU=4, reward=4),
        node("l", {"zone": "a"}, CPU=4),
    ]
    assert place(run_bundles(run), nodes) == []
    assert table(nodes) == {
        "r": "2 rollout (has 4 CPU, 2 rollout)",
        "s": "1 reward shapes, 1 reward jpeg (has 4 CPU, 4 reward)",
        "l": "1 learner (has 4 CPU)",
    }


def test_nodes_that_the_autoscaler_may_add_come_last() -> None:
    nodes = [node("to come", CPU=8, exists=False), node("here", CPU=2)]
    left = place([Bundle(role=ROLLOUT, needs={"CPU": 1.0})] * 3, nodes)
    assert left == []
    assert table(nodes) == {
        "to be added: to come": "1 rollout (has 8 CPU)",
        "here": "2 rollout (has 2 CPU)",
    }


@pytest.mark.parametrize(
    ("shares", "gpus", "left"),
    [
        ([0.6, 0.6, 0.6], 2.0, 1),
        ([0.6, 0.6, 0.4, 0.4], 2.0, 0),
        ([1.0, 0.5, 0.5], 2.0, 0),
        ([2.0, 0.5], 2.0, 1),
        ([0.3333] * 6, 2.0, 0),
        ([1.0, 0.4], 1.4, 0),  # others hold 0.6 of one of two
        ([0.7, 0.7], 1.4, 1),
    ],
)
def test_a_share_of_a_gpu_lies_on_one_gpu(shares: list[float], gpus: float, left: int) -> None:
    """Sums would let three shares of 0.6 onto two GPUs, where Ray would never place the third."""
    one = Node(title="one", free={"CPU": 8.0, "GPU": gpus}, total={"CPU": 8.0, "GPU": 2.0})
    wanted = [Bundle(role=ROLLOUT, needs={"GPU": share}) for share in shares]
    assert len(place(wanted, [one])) == left


def test_shares_that_do_not_fill_a_gpu_are_said() -> None:
    nodes = [node("one", CPU=8, GPU=2)]
    wanted = [Bundle(role=ROLLOUT, needs={"CPU": 1.0, "GPU": 0.6})] * 3
    with pytest.raises(
        UserError,
        match=(
            r"reserves 1\.8 GPU and there are 2; a share of 0\.6 lies on one GPU, which holds 1;"
            r" lower runtime"
        ),
    ):
        refuse(place(wanted, nodes), nodes, "here")


def test_who_has_the_least_choice_of_nodes_comes_first() -> None:
    """Whoever goes anywhere must not take the only place of one that goes nowhere else."""
    nodes = [node("a", {"zone": "a"}, CPU=1), node("b", CPU=1)]
    anywhere, bound = (
        Bundle(role=LEARNER, needs={"CPU": 1.0}),
        Bundle(role=ROLLOUT, needs={"CPU": 1.0}, labels={"zone": "a"}),
    )
    assert place([anywhere, bound], nodes) == []


def test_labels_of_nodes_to_be_added_are_possible_where_ray_does_not_tell_them() -> None:
    """Of a group without nodes Ray's state knows no labels; where there are some, theirs are the
    group's."""
    bundle = Bundle(role=ROLLOUT, needs={"GPU": 1.0}, labels={"zone": "a"})
    empty = to_be_added("gpus", {"GPU": 1.0}, 2, [])
    assert [n.title for n in empty] == ["gpus +1", "gpus +2"]
    assert place([bundle], empty) == []
    told = "1 rollout (has 1 GPU), if it comes with the labels zone=a, of which Ray does not tell"
    assert table(empty) == {"to be added: gpus +1": told}

    present = [
        {"zone": "a", "ray.io/node-id": "1", "disk": "ssd"},
        {"zone": "a", "ray.io/node-id": "2"},
    ]
    (third,) = to_be_added("gpus", {"GPU": 1.0}, 3, present)
    assert third.labels == {"zone": "a"}
    assert place([bundle], [third]) == []
    assert table([third]) == {"to be added: gpus +1": "1 rollout (has 1 GPU)"}
    (other,) = to_be_added("gpus", {"GPU": 1.0}, 3, [{"zone": "b"}, {"zone": "b"}])
    assert place([bundle], [other]) == [bundle]


def test_a_group_without_an_upper_bound_has_room() -> None:
    assert len(to_be_added("any", {"CPU": 1.0}, -1, [])) == 256
    assert to_be_added("full", {"CPU": 1.0}, 1, [{}, {}]) == []


@pytest.mark.parametrize(
    ("bundle", "nodes", "message"),
    [
        (
            Bundle(role=ROLLOUT, needs={"GPU": 1.0}),
            [node("a", CPU=4)],
            "one needs 1 GPU and no node has more than 0",
        ),
        (
            Bundle(role=ROLLOUT, needs={"CPU": 1.0}, labels={"zone": "b"}),
            [node("a", {"zone": "a"}, CPU=4)],
            "no node has the labels zone=b; mend runtime",
        ),
        (
            Bundle(role=ROLLOUT, needs={"rollout": 1.0}),
            [node("a", rollout=1)],
            (
                "the run reserves 2 rollout and there are 1; lower runtime.rollout.workers, or add"
                " a node"
            ),
        ),
    ],
)
def test_what_is_short_is_named(bundle: Bundle, nodes: list[Node], message: str) -> None:
    left = place([bundle, bundle], nodes)
    with pytest.raises(UserError, match=message):
        refuse(left, nodes, "here")


def test_nothing_left_is_no_error() -> None:
    refuse([], [], "here")
