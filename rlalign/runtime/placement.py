"""What a run reserves, which node gets what, and what is missing: worked out before anything starts.

Each worker is one bundle of resources that one node must hold, and a share of a GPU lies on one GPU. They are put on nodes
largest first, each on the fullest node that still holds it, which is how a person would fill machines; Ray itself may place
them otherwise, but what does not fit here fits nowhere, up to the usual gaps of packing. Where an autoscaler runs, nodes that
it may still add count too.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rlalign.config import Run, RuntimeSettings
from rlalign.registry import UserError
from rlalign.sample import Sample

ROLLOUT = "rollout"
_EPSILON = 1e-6
HERE = "on this machine"
"""Where a local Ray looks for places."""
_MOST = 256
"""Nodes of a group that are looked at."""
_OF_ONE_NODE = ("ray.io/node-id", "ray.io/availability-zone", "ray.io/region")
"""Labels in which the next node of a group may differ."""


def reward_role(title: str) -> str:
    """The role of the workers that serve a reward."""
    return f"reward {title}"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What one worker reserves."""

    role: str
    needs: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        labels = "".join(f", {name}={value}" for name, value in self.labels.items())
        return (", ".join(f"{amount:g} {name}" for name, amount in self.needs.items()) or "nothing") + labels


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
    """What is free of each GPU. Of others' shares Ray tells the sum alone; it packs them tightly, so that is assumed."""

    def __post_init__(self) -> None:
        whole, rest = divmod(self.free.get("GPU", 0.0) + _EPSILON, 1.0)
        self.gpus = [*([1.0] * int(whole)), *([rest] if rest > 2 * _EPSILON else [])]

    def takes(self, bundle: Bundle) -> bool:
        """Whether there is room for it."""
        return self.may(bundle) and all(self.has(name, amount) for name, amount in bundle.needs.items())

    def has(self, name: str, amount: float) -> bool:
        """Whether so much of a resource is free for one worker: a share of a GPU on one of them, or whole ones."""
        if name == "GPU":
            return sum(free + _EPSILON >= min(amount, 1.0) for free in self.gpus) >= max(1, round(amount))
        return self.free.get(name, 0.0) + _EPSILON >= amount

    def may(self, bundle: Bundle) -> bool:
        """Whether its labels are the ones asked for, or, of a node to be added, may be."""
        known = [name for name in bundle.labels if self.exists or name in self.labels]
        return all(matches(self.labels.get(name), bundle.labels[name]) for name in known)

    def unknown(self, bundle: Bundle) -> dict[str, str]:
        """The labels asked for of which it is not known whether the node will have them."""
        return {n: rule for n, rule in bundle.labels.items() if not self.exists and n not in self.labels}

    def put(self, bundle: Bundle) -> None:
        """Reserves it; a share of a GPU on the fullest one that holds it, as Ray does."""
        self.holds.append(bundle)
        for name, amount in bundle.needs.items():
            self.free[name] = self.free.get(name, 0.0) - amount
        share = bundle.needs.get("GPU", 0.0)
        for _ in range(math.ceil(share - _EPSILON)):
            taken = min(share, 1.0)
            fullest = min(range(len(self.gpus)), key=lambda i: (self.gpus[i] + _EPSILON < taken, self.gpus[i]))
            self.gpus[fullest] -= taken


def matches(value: str | None, rule: str) -> bool:
    """Ray's label rules: ``a``, ``!a``, ``in(a,b)``, ``!in(a,b)``; a node without the label meets the negated ones."""
    negated, body = rule.startswith("!"), rule.removeprefix("!")
    found = re.fullmatch(r"in\((.*)\)", body)
    allowed = {part.strip() for part in found.group(1).split(",")} if found else {body}
    return (value in allowed) != negated


def bundles(run: Run | Sample) -> list[Bundle]:
    """Every worker of a run: learners, rollouts, rewards with their spares, and a place for Ray Data where that reads."""
    runtime = run.runtime
    found: list[Bundle] = []
    if isinstance(run, Run):
        learner = _bundle(
            "learner",
            runtime.learner_cpus,
            runtime.learner_gpus,
            runtime.learner_resources,
            runtime.learner_labels,
        )
        found += [learner] * runtime.learner_workers
        if run.preferences is not None and run.preferences.reader == "ray":
            found.append(Bundle(role="Ray Data", needs={"CPU": 1.0}))  # without a place of its own it waits for ever
    found += [rollout(runtime)] * runtime.rollout_workers
    for reward in run.rewards_for("evaluate"):
        one = _bundle(
            reward_role(reward.title),
            runtime.reward_cpus,
            runtime.reward_gpus,
            runtime.reward_resources,
            runtime.reward_labels,
        )
        found += [one] * (runtime.reward_workers + (runtime.reward_spares if isinstance(run, Run) else 0))
    return found


def rollout(runtime: RuntimeSettings) -> Bundle:
    """A rollout worker's bundle."""
    return _bundle(
        ROLLOUT, runtime.rollout_cpus, runtime.rollout_gpus, runtime.rollout_resources, runtime.rollout_labels
    )


def _bundle(role: str, cpus: float, gpus: float, resources: Mapping[str, float], labels: Mapping[str, str]) -> Bundle:
    needs = {"CPU": cpus, "GPU": gpus, **resources}
    return Bundle(role=role, needs={name: amount for name, amount in needs.items() if amount}, labels=labels)


def needed(run: Run | Sample, resource: str) -> float:
    """How much of a resource all workers of a run reserve together."""
    return sum(bundle.needs.get(resource, 0.0) for bundle in bundles(run))


def custom(run: Run | Sample) -> dict[str, float]:
    """Custom resources that a run names, as much of each as it reserves: what a local Ray pretends to have."""
    names = {name for bundle in bundles(run) for name in bundle.needs} - {"CPU", "GPU"}
    return {name: needed(run, name) for name in sorted(names)}


def pretended_labels(run: Run | Sample) -> dict[str, str]:
    """Labels with which a local Ray, the only node there is, meets what a run asks of nodes."""
    runtime = run.runtime
    rules = {**runtime.rollout_labels, **runtime.reward_labels, **runtime.learner_labels}
    plain = {name: rule for name, rule in rules.items() if not rule.startswith("!")}
    return {name: rule.removeprefix("in(").rstrip(")").partition(",")[0].strip() for name, rule in plain.items()}


def place(wanted: Iterable[Bundle], nodes: Sequence[Node]) -> list[Bundle]:
    """Fills the nodes; returns the bundles that found no place. Those with the least choice of nodes come first.

    Existing nodes come before those to be added.
    """

    def order(bundle: Bundle) -> tuple[float, ...]:
        needs = bundle.needs
        return (choice[id(bundle)], -needs.get("GPU", 0.0), -len(needs), -needs.get("CPU", 0.0))

    bundles, left = list(wanted), list[Bundle]()
    kinds = {id(bundle): bundle for bundle in bundles}
    choice = {kind: sum(node.takes(bundle) for node in nodes) for kind, bundle in kinds.items()}
    for bundle in sorted(bundles, key=order):
        rooms = [node for node in nodes if node.takes(bundle)]
        if not rooms:
            left.append(bundle)
            continue
        best = min(
            rooms,
            key=lambda n: (not n.exists, len(n.unknown(bundle)), n.free.get("GPU", 0.0), n.free.get("CPU", 0.0)),
        )
        best.put(bundle)
    return left


def refuse(left: Sequence[Bundle], nodes: Sequence[Node], where: str) -> None:
    """Raises UserError for bundles without a place: which resource is short, whether it is lacking or taken, the way out."""
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
            f"{lack}: no node has the labels {labels}; mend runtime.*_labels, or {'label a node' if where != HERE else more}"
        )
    for name, amount in first.needs.items():
        largest = max(node.total.get(name, 0.0) for node in fitting)
        if largest + _EPSILON < amount:
            raise UserError(
                f"{lack}: one needs {amount:g} {name} and no node has more than {largest:g}; "
                f"lower the runtime setting, or {more}{f' with {name}' if where != HERE else ''}"
            )
    short = [name for name, amount in first.needs.items() if not any(node.has(name, amount) for node in fitting)]
    name = (short or list(first.needs))[0]
    total = sum(node.total.get(name, 0.0) for node in fitting)
    wanted = sum(b.needs.get(name, 0.0) for b in (*left, *(b for node in nodes for b in node.holds)))
    taken = total - sum(node.free.get(name, 0.0) for node in fitting)
    mine = sum(b.needs.get(name, 0.0) for node in fitting for b in node.holds)
    others = f", of which others hold {taken - mine:g}" if taken - mine > _EPSILON else ""
    share = first.needs[name]
    cut = (
        f"; a share of {share:g} lies on one GPU, which holds {int(1 / share + _EPSILON)}"
        if name == "GPU" and share < 1
        else ""
    )
    raise UserError(
        f"{lack}: the run reserves {wanted:g} {name} and there are {total:g}{others}{cut}; "
        f"{'wait for the other work to end, ' if others else ''}lower runtime.rollout_workers, or {more}"
    )


def this_machine(run: Run | Sample, gpus: int) -> Node:
    """The only node of a local Ray: CPUs, custom resources and labels are given to it as the run asks, GPUs are real."""
    cpus = max(os.cpu_count() or 1, math.ceil(needed(run, "CPU") - _EPSILON))
    has = {"CPU": float(cpus), "GPU": float(gpus), **custom(run)}
    return Node(title="this machine", free=dict(has), total=has, labels=pretended_labels(run))


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster that this process has joined, and those that its autoscaler may still add."""
    import ray
    from ray._private.state import available_resources_per_node, state

    free = available_resources_per_node()
    found, groups = list[Node](), defaultdict[str, list[dict[str, str]]](list)
    for node in ray.nodes():
        if not node["Alive"]:
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
    config = state.get_cluster_config()
    for group in config.node_group_configs if config else ():
        found += to_be_added(group.name, dict(sorted(group.resources.items())), group.max_count, groups[group.name])
    return found


def to_be_added(
    group: str, resources: Mapping[str, float], most: int, present: Sequence[Mapping[str, str]]
) -> list[Node]:
    """Nodes that the autoscaler may still add to a group of ``most`` at most (-1: any number), of which these are ``present``.

    Ray's state says nothing of a group's labels (2.60): what its present nodes share is taken to be the group's, whatever
    else is asked for is possible.
    """
    shared = set.intersection(*(set(labels.items()) for labels in present)) if present else set()
    labels = {name: value for name, value in shared if name not in _OF_ONE_NODE}
    return [
        Node(title=f"{group} +{n + 1}", free=dict(resources), total=resources, labels=labels, exists=False)
        for n in range(max(0, (min(most, _MOST) if most >= 0 else _MOST) - len(present)))
    ]


def table(nodes: Sequence[Node]) -> dict[str, str]:
    """Node -> what it is to hold, in words; nodes that would have to be added say so, and which labels they need for it."""
    rows: dict[str, str] = {}
    for node in nodes:
        if node.exists or node.holds:
            count = Counter(bundle.role for bundle in node.holds)
            has = ", ".join(f"{amount:g} {name}" for name, amount in node.total.items() if "memory" not in name)
            told = ", ".join(f"{n} {role}" for role, n in count.items()) or "nothing"
            asked = {n: rule for bundle in node.holds for n, rule in node.unknown(bundle).items()}
            labels = ", ".join(f"{name}={rule}" for name, rule in asked.items())
            unless = f", if it comes with the labels {labels}, of which Ray does not tell" if labels else ""
            rows[f"{'' if node.exists else 'to be added: '}{node.title}"] = f"{told} (has {has}){unless}"
    return rows
