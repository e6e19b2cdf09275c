"""What a run reserves, which node gets what, and what is missing: worked out before anything starts.

Each worker is one bundle of resources that one node must hold. They are put on nodes largest first, each on the fullest node
that still holds it, which is how a person would fill machines; Ray itself may place them otherwise, but what does not fit
here fits nowhere, up to the usual gaps of packing. Where an autoscaler runs, nodes that it may still add count too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rlalign.config import Run, RuntimeSettings
from rlalign.registry import UserError
from rlalign.sample import Sample

ROLLOUT = "rollout"
_EPSILON = 1e-6


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
    exists: bool = True
    holds: list[Bundle] = field(default_factory=list)

    def takes(self, bundle: Bundle) -> bool:
        """Whether there is room for it."""
        return self.may(bundle) and all(self.free.get(n, 0.0) + _EPSILON >= a for n, a in bundle.needs.items())

    def may(self, bundle: Bundle) -> bool:
        """Whether its labels are the ones asked for."""
        return all(matches(self.labels.get(name), rule) for name, rule in bundle.labels.items())

    def put(self, bundle: Bundle) -> None:
        """Reserves it."""
        self.holds.append(bundle)
        for name, amount in bundle.needs.items():
            self.free[name] = self.free.get(name, 0.0) - amount


def matches(value: str | None, rule: str) -> bool:
    """Ray's label rules: ``a``, ``!a``, ``in(a,b)``, ``!in(a,b)``; a node without the label meets the negated ones."""
    negated, body = rule.startswith("!"), rule.removeprefix("!")
    found = re.fullmatch(r"in\((.*)\)", body)
    allowed = {part.strip() for part in found.group(1).split(",")} if found else {body}
    return (value in allowed) != negated


def bundles(run: Run | Sample) -> list[Bundle]:
    """Every worker of a run: learners, rollouts, rewards, and a place for Ray Data where that reads."""
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
        found += [one] * runtime.reward_workers
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
    """Fills the nodes; returns the bundles that found no place. Existing nodes come before those to be added."""
    left: list[Bundle] = []
    for bundle in sorted(wanted, key=lambda b: (-b.needs.get("GPU", 0.0), -len(b.needs), -b.needs.get("CPU", 0.0))):
        rooms = [node for node in nodes if node.takes(bundle)]
        if rooms:
            min(rooms, key=lambda n: (not n.exists, n.free.get("GPU", 0.0), n.free.get("CPU", 0.0))).put(bundle)
        else:
            left.append(bundle)
    return left


def refuse(left: Sequence[Bundle], nodes: Sequence[Node], where: str) -> None:
    """Raises UserError for bundles without a place: which resource is short, whether it is lacking or taken, the way out."""
    if not left:
        return
    count = Counter(bundle.role for bundle in left)
    first = left[0]
    who = ", ".join(f"{n} {role} worker" + "s" * (n > 1) for role, n in count.items())
    lack = f"runtime: {who} found no place on the cluster at {where}"
    fitting = [node for node in nodes if node.may(first)]
    if not fitting:
        labels = ", ".join(f"{name}={value}" for name, value in first.labels.items())
        raise UserError(f"{lack}: no node has the labels {labels}; mend runtime.*_labels, or label a node")
    for name, amount in first.needs.items():
        largest = max(node.total.get(name, 0.0) for node in fitting)
        if largest + _EPSILON < amount:
            raise UserError(
                f"{lack}: one needs {amount:g} {name} and no node has more than {largest:g}; "
                f"lower the runtime setting, or add a node with {name}"
            )
    short = [n for n, a in first.needs.items() if all(node.free.get(n, 0.0) + _EPSILON < a for node in fitting)]
    name = (short or list(first.needs))[0]
    total = sum(node.total.get(name, 0.0) for node in fitting)
    wanted = sum(b.needs.get(name, 0.0) for b in (*left, *(b for node in nodes for b in node.holds)))
    taken = total - sum(node.free.get(name, 0.0) for node in fitting)
    mine = sum(b.needs.get(name, 0.0) for node in fitting for b in node.holds)
    others = f", of which others hold {taken - mine:g}" if taken - mine > _EPSILON else ""
    raise UserError(
        f"{lack}: the run reserves {wanted:g} {name} and there are {total:g}{others}; "
        f"{'wait for the other work to end, ' if others else ''}lower runtime.rollout_workers, or add a node"
    )


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster that this process has joined, and those that its autoscaler may still add."""
    import ray
    from ray._private.state import available_resources_per_node, state

    free = available_resources_per_node()
    found, kinds = list[Node](), Counter[str]()
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        total = {n: a for n, a in node["Resources"].items() if not n.startswith("node:")}
        labels: dict[str, str] = node.get("Labels") or {}
        kinds[labels.get("ray.io/node-group", "")] += 1
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
        resources = dict(group.resources)
        for number in range(max(0, min(group.max_count, 256) - kinds[group.name])):
            title = f"{group.name} +{number + 1}"
            found.append(Node(title=title, free=dict(resources), total=resources, exists=False))
    return found


def table(nodes: Sequence[Node]) -> dict[str, str]:
    """Node -> what it is to hold, in words; nodes that would have to be added say so."""
    rows: dict[str, str] = {}
    for node in nodes:
        if node.exists or node.holds:
            count = Counter(bundle.role for bundle in node.holds)
            has = ", ".join(f"{amount:g} {name}" for name, amount in node.total.items() if "memory" not in name)
            told = ", ".join(f"{n} {role}" for role, n in count.items()) or "nothing"
            rows[f"{'' if node.exists else 'to be added: '}{node.title}"] = f"{told} (has {has})"
    return rows
