"""Which node gets what, and what is said when something finds no place."""

from __future__ import annotations

from collections import Counter

import pytest

from rlalign.registry import UserError
from rlalign.runtime.placement import Bundle, Node, bundles, custom, matches, place, pretended_labels, refuse, table
from tests.runs import small_run


def node(title: str, labels: dict[str, str] | None = None, *, exists: bool = True, **has: float) -> Node:
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
        "runtime.rollout_workers=3",
        "runtime.rollout_gpus=0.75",
        "runtime.rollout_resources={rollout: 1}",
        "runtime.reward_gpus=0.25",
        "runtime.learner_labels={zone: a}",
    )
    found = bundles(run)
    assert Counter(b.role for b in found) == {"learner": 1, "rollout": 3, "reward shapes": 1, "reward jpeg": 1}
    rollout = next(b for b in found if b.role == "rollout")
    assert rollout.needs == {"CPU": 1.0, "GPU": 0.75, "rollout": 1.0}
    assert next(b for b in found if b.role == "learner").labels == {"zone": "a"}
    assert custom(run) == {"rollout": 3.0}
    assert pretended_labels(run) == {"zone": "a"}


def test_shares_of_a_gpu_are_colocated() -> None:
    """Three quarters and a quarter go onto one GPU, twice: two GPUs hold two rollouts and two rewards."""
    run = small_run("runtime.rollout_workers=2", "runtime.rollout_gpus=0.75", "runtime.reward_gpus=0.25")
    nodes = [node("one", CPU=8, GPU=2)]
    assert place(bundles(run), nodes) == []
    assert nodes[0].free["GPU"] == pytest.approx(0.0)


def test_custom_resources_and_labels_separate_the_pools() -> None:
    run = small_run(
        "runtime.rollout_resources={rollout: 1}",
        "runtime.reward_resources={reward: 1}",
        "runtime.learner_labels={zone: a}",
    )
    nodes = [node("r", CPU=4, rollout=2), node("s", CPU=4, reward=4), node("l", {"zone": "a"}, CPU=4)]
    assert place(bundles(run), nodes) == []
    assert table(nodes) == {
        "r": "2 rollout (has 4 CPU, 2 rollout)",
        "s": "1 reward shapes, 1 reward jpeg (has 4 CPU, 4 reward)",
        "l": "1 learner (has 4 CPU)",
    }


def test_nodes_that_the_autoscaler_may_add_come_last() -> None:
    nodes = [node("to come", CPU=8, exists=False), node("here", CPU=2)]
    left = place([Bundle(role="rollout", needs={"CPU": 1.0})] * 3, nodes)
    assert left == []
    assert table(nodes) == {"to be added: to come": "1 rollout (has 8 CPU)", "here": "2 rollout (has 2 CPU)"}


@pytest.mark.parametrize(
    ("bundle", "nodes", "message"),
    [
        (
            Bundle(role="rollout", needs={"GPU": 1.0}),
            [node("a", CPU=4)],
            "one needs 1 GPU and no node has more than 0",
        ),
        (
            Bundle(role="rollout", needs={"CPU": 1.0}, labels={"zone": "b"}),
            [node("a", {"zone": "a"}, CPU=4)],
            "no node has the labels zone=b; mend runtime",
        ),
        (
            Bundle(role="rollout", needs={"rollout": 1.0}),
            [node("a", rollout=1)],
            "the run reserves 2 rollout and there are 1; lower runtime.rollout_workers, or add a node",
        ),
    ],
)
def test_what_is_short_is_named(bundle: Bundle, nodes: list[Node], message: str) -> None:
    left = place([bundle, bundle], nodes)
    with pytest.raises(UserError, match=message):
        refuse(left, nodes, "here")


def test_nothing_left_is_no_error() -> None:
    refuse([], [], "here")
