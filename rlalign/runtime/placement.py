"""Which node gets which bundle, and what is missing: worked out before anything starts.

Each worker is one bundle of resources that one node must hold, and a share of a GPU lies on one
GPU. They are put on nodes largest first, each on the fullest node that still holds it, which is how
a person would fill machines; Ray itself may place them otherwise, but what does not fit here fits
nowhere, up to the usual gaps of packing. Where an autoscaler runs, nodes that it may still add
count too.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from rlalign.core.registry import UserError
from rlalign.runtime.roles import Role

_EPSILON = 1e-6
HERE = "on this machine"
"""Where a local Ray looks for places."""
_MOST = 256
"""Nodes of a group that are looked at."""
_OF_ONE_NODE = ("ray.io/node-id", "ray.io/availability-zone", "ray.io/region")
"""Labels in which the next node of a group may differ."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What one worker reserves."""

    role: Role
    needs: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        labels = "".join(f", {name}={value}" for name, value in self.labels.items())
        return (
            ", ".join(f"{amount:g} {name}" for name, amount in self.needs.items()) or "nothing"
        ) + labels


@dataclass(kw_only=True)
class Node:
    """A node of the cluster, or one that its autoscaler may add."""

    title: str
    free: dict[str, float]
    total: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of a node to be added, those that are known: others may come with it."""
    exists: bool = True
    holds: list[Bundle] = field(default_factory=list)
    gpus: list[float] = field(init=False)
    """What is free of each GPU. Of others' shares Ray tells the sum alone; it packs them tightly,
    so that is assumed."""

    def __post_init__(self) -> None:
        whole, rest = divmod(self.free.get("GPU", 0.0) + _EPSILON, 1.0)
        self.gpus = [*([1.0] * int(whole)), *([rest] if rest > 2 * _EPSILON else [])]

    def takes(self, bundle: Bundle) -> bool:
        """Whether there is room for it."""
        return self.may(bundle) and all(
            self.has(name, amount) for name, amount in bundle.needs.items()
        )

    def has(self, name: str, amount: float) -> bool:
        """Whether so much of a resource is free for one worker: a share of a GPU on one of them, or
        whole ones."""
        if name == "GPU":
            return sum(free + _EPSILON >= min(amount, 1.0) for free in self.gpus) >= max(
                1, round(amount)
            )
        return self.free.get(name, 0.0) + _EPSILON >= amount

    def may(self, bundle: Bundle) -> bool:
        """Whether its labels are the ones asked for, or, of a node to be added, may be."""
        known = [name for name in bundle.labels if self.exists or name in self.labels]
        return all(matches(self.labels.get(name), bundle.labels[name]) for name in known)

    def unknown(self, bundle: Bundle) -> dict[str, str]:
        """The labels asked for of which it is not known whether the node will have them."""
        return {
            n: rule for n, rule in bundle.labels.items() if not self.exists and n not in self.labels
        }

    def put(self, bundle: Bundle) -> None:
        """Reserves it; a share of a GPU on the fullest one that holds it, as Ray does."""
        self.holds.append(bundle)
        for name, amount in bundle.needs.items():
            self.free[name] = self.free.get(name, 0.0) - amount
        share = bundle.needs.get("GPU", 0.0)
        for _ in range(math.ceil(share - _EPSILON)):
            taken = min(share, 1.0)
            fullest = min(
                range(len(self.gpus)), key=lambda i: (self.gpus[i] + _EPSILON < taken, self.gpus[i])
            )
            self.gpus[fullest] -= taken


def matches(value: str | None, rule: str) -> bool:
    """Ray's label rules: ``a``, ``!a``, ``in(a,b)``, ``!in(a,b)``; a node without the label meets
    the negated ones."""
    negated = rule.startswith("!")
    body = rule.removeprefix("!")
    found = re.fullmatch(r"in\((.*)\)", body)
    allowed = {part.strip() for part in found.group(1).split(",")} if found else {body}
    return (value in allowed) != negated


def needed(bundles: Iterable[Bundle], resource: str) -> float:
    """How much of a resource the bundles reserve together."""
    return sum(bundle.needs.get(resource, 0.0) for bundle in bundles)


def custom(bundles: Sequence[Bundle]) -> dict[str, float]:
    """Custom resources that the bundles name, as much of each as they reserve: what a local Ray
    pretends to have."""
    names = set(chain.from_iterable(bundle.needs for bundle in bundles)) - {"CPU", "GPU"}
    return {name: needed(bundles, name) for name in sorted(names)}


def pretended_labels(bundles: Sequence[Bundle]) -> dict[str, str]:
    """Labels with which a local Ray, the only node there is, meets what the bundles ask of nodes;
    where they contradict each other, the first ones' do."""
    found: dict[str, str] = {}
    for bundle in reversed(bundles):
        for name, rule in bundle.labels.items():
            if not rule.startswith("!"):
                found[name] = rule.removeprefix("in(").rstrip(")").partition(",")[0].strip()
    return found


def place(wanted: Iterable[Bundle], nodes: Sequence[Node]) -> list[Bundle]:
    """Fills the nodes; returns the bundles that found no place. Those with the least choice of
    nodes come first.

    Existing nodes come before those to be added.
    """

    def order(bundle: Bundle) -> tuple[float, ...]:
        needs = bundle.needs
        return (choice[id(bundle)], -needs.get("GPU", 0.0), -len(needs), -needs.get("CPU", 0.0))

    # bundles with the fewest possible nodes come first, then the largest
    bundles = list(wanted)
    left = list[Bundle]()
    kinds = {id(bundle): bundle for bundle in bundles}
    choice = {kind: sum(node.takes(bundle) for node in nodes) for kind, bundle in kinds.items()}
    for bundle in sorted(bundles, key=order):
        # a node that exists, and has the least free beside it, is taken first
        rooms = [node for node in nodes if node.takes(bundle)]
        if not rooms:
            left.append(bundle)
            continue
        best = min(
            rooms,
            key=lambda n: (
                not n.exists,
                len(n.unknown(bundle)),
                n.free.get("GPU", 0.0),
                n.free.get("CPU", 0.0),
            ),
        )
        best.put(bundle)
    return left


def refuse(left: Sequence[Bundle], nodes: Sequence[Node], where: str) -> None:
    """Raises UserError for bundles without a place: which resource is short, whether it is lacking
    or taken, the way out."""
    if not left:
        return
    count = Counter(bundle.role for bundle in left)
    first = left[0]
    who = ", ".join(f"{n} {role} worker" + "s" * (n > 1) for role, n in count.items())
    lack = f"runtime: {who} found no place {where}"
    more = "join a cluster with --address" if where == HERE else "add a node"
    fitting = [node for node in nodes if node.may(first)]
    if not fitting:
        labels = ", ".join(f"{name}={value}" for name, value in first.labels.items())
        raise UserError(
            f"{lack}: no node has the labels {labels}; mend runtime.*.labels, or"
            f" {'label a node' if where != HERE else more}"
        )
    # no single node is large enough
    for name, amount in first.needs.items():
        largest = max(node.total.get(name, 0.0) for node in fitting)
        if largest + _EPSILON < amount:
            raise UserError(
                f"{lack}: one needs {amount:g} {name} and no node has more than {largest:g}; "
                f"lower the runtime setting, or {more}{f' with {name}' if where != HERE else ''}"
            )

    # the nodes are large enough, and their sum is not
    short = [n for n, much in first.needs.items() if not any(one.has(n, much) for one in fitting)]
    name = (short or list(first.needs))[0]
    total = sum(node.total.get(name, 0.0) for node in fitting)
    placed = chain.from_iterable(node.holds for node in nodes)
    wanted = needed((*left, *placed), name)
    taken = total - sum(node.free.get(name, 0.0) for node in fitting)
    mine = sum(needed(node.holds, name) for node in fitting)
    others = f", of which others hold {taken - mine:g}" if taken - mine > _EPSILON else ""
    share = first.needs[name]
    cut = (
        f"; a share of {share:g} lies on one GPU, which holds {int(1 / share + _EPSILON)}"
        if name == "GPU" and share < 1
        else ""
    )
    raise UserError(
        f"{lack}: the run reserves {wanted:g} {name} and there are {total:g}{others}{cut};"
        f" {'wait for the other work to end, ' if others else ''}lower runtime.rollout.workers, or"
        f" {more}"
    )


def this_machine(bundles: Sequence[Bundle], gpus: int) -> Node:
    """The only node of a local Ray: CPUs, custom resources and labels are given to it as the
    bundles ask, GPUs are real."""
    cpus = max(os.cpu_count() or 1, math.ceil(needed(bundles, "CPU") - _EPSILON))
    has = {"CPU": float(cpus), "GPU": float(gpus), **custom(bundles)}
    return Node(title="this machine", free=dict(has), total=has, labels=pretended_labels(bundles))


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster that this process has joined and that stay, and those that its
    autoscaler may still add."""
    import ray
    from ray._private.state import available_resources_per_node, state

    # nodes that exist
    free = available_resources_per_node()
    found = list[Node]()
    groups = defaultdict[str, list[dict[str, str]]](list)
    draining = state.get_draining_nodes()
    for node in ray.nodes():
        if not node["Alive"] or node["NodeID"] in draining:
            continue
        total = {n: a for n, a in node["Resources"].items() if not n.startswith("node:")}
        labels: dict[str, str] = node.get("Labels") or {}
        groups[labels.get("ray.io/node-group", "")].append(labels)
        found.append(
            Node(
                title=node["NodeManagerAddress"],
                free={n: a for n, a in free.get(node["NodeID"], {}).items() if n in total},
                total=total,
                labels=labels,
            )
        )

    # nodes that an autoscaler may add
    config = state.get_cluster_config()
    for group in config.node_group_configs if config else ():
        found += to_be_added(
            group.name, dict(sorted(group.resources.items())), group.max_count, groups[group.name]
        )
    return found


def has_autoscaler() -> bool:
    """Whether an autoscaler may add nodes to the cluster that this process has joined, of which
    Ray's state says nothing: its own (2.60) does not report its groups there.

    A cluster without one has a monitor too, which calls each node a kind of its own.
    """
    from ray import _raylet
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    # which autoscaler a cluster has is noted by its head
    names: Any = _raylet
    key = names.GCS_AUTOSCALER_V2_ENABLED_KEY.encode()
    if _internal_kv_get(key, namespace=names.GCS_AUTOSCALER_STATE_NAMESPACE.encode()) == b"1":
        return True
    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    kinds = (status.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(not kind.startswith("node_") for kind in kinds)


def to_be_added(
    group: str, resources: Mapping[str, float], most: int, present: Sequence[Mapping[str, str]]
) -> list[Node]:
    """Nodes that the autoscaler may still add to a group of ``most`` at most (-1: any number), of
    which these are ``present``.

    Ray's state says nothing of a group's labels (2.60): what its present nodes share is taken to be
    the group's, whatever else is asked for is possible.
    """
    shared = set.intersection(*(set(labels.items()) for labels in present)) if present else set()
    labels = {name: value for name, value in shared if name not in _OF_ONE_NODE}
    return [
        Node(
            title=f"{group} +{n + 1}",
            free=dict(resources),
            total=resources,
            labels=labels,
            exists=False,
        )
        for n in range(max(0, (min(most, _MOST) if most >= 0 else _MOST) - len(present)))
    ]


def table(nodes: Sequence[Node]) -> dict[str, str]:
    """Node -> what it is to hold, in words; nodes that would have to be added say so, and which
    labels they need for it."""
    rows: dict[str, str] = {}
    for node in nodes:
        # a node that may be added is shown only where something is placed on it
        if node.exists or node.holds:
            count = Counter(bundle.role for bundle in node.holds)
            has = ", ".join(
                f"{amount:g} {name}" for name, amount in node.total.items() if "memory" not in name
            )
            told = ", ".join(f"{n} {role}" for role, n in count.items()) or "nothing"

            # Ray does not tell the labels of a node to be added
            asked = {n: rule for bundle in node.holds for n, rule in node.unknown(bundle).items()}
            labels = ", ".join(f"{name}={rule}" for name, rule in asked.items())
            unless = (
                f", if it comes with the labels {labels}, of which Ray does not tell"
                if labels
                else ""
            )
            rows[f"{'' if node.exists else 'to be added: '}{node.title}"] = (
                f"{told} (has {has}){unless}"
            )
    return rows
