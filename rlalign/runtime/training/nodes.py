"""The nodes that hold a run: where its actors are, which nodes are about to go, and how long each
of them was there.

A cloud gives notice before it takes a spot machine away. Who hears of it tells Ray (``ray
drain-node``, the end of a Kubernetes pod, an autoscaler), and the node *drains*: Ray places nothing
on it any more, what is there goes on, and at a deadline, where one was told, it is gone.

    (in use) --notice--> draining --its actors have left, or the deadline--> (not a node any more)

The driver asks Ray for draining nodes at every look, which is one small question, and where the
run's actors are every SURVEY_SECONDS, or at once when a node begins to drain.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private import state as ray_state  # public ways need Ray's dashboard
from ray.actor import ActorHandle

SURVEY_SECONDS = 5.0
"""How exactly the hours of nodes are counted."""
_SURVEYS_SHARE = 50.0
"""A survey that took long, as of thousands of actors, is done again after so many times that, or a
minute."""
LAST_SECONDS = 1.5
"""Before its deadline a node counts as gone: what works there until then would be waited for until
Ray notices its death."""


def draining_nodes() -> dict[str, float]:
    """Node that drains -> when it is taken away, seconds since the epoch; inf where nobody said."""
    found = ray_state.state.get_draining_nodes()
    return {node: deadline / 1000 if deadline else math.inf for node, deadline in found.items()}


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """What nodes of one price have in common, as far as Ray knows."""

    group: str = ""
    """The autoscaler's group; "" where the node was started by hand."""
    market: str = ""
    """``spot`` or ``on-demand``, where the node has the label."""
    cpus: float = 0.0
    """CPUs of a node, as Ray counts them."""
    gpus: float = 0.0

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> NodeKind:
        """The kind of one of ``ray.nodes()``."""
        labels = node.get("Labels") or {}
        resources = node["Resources"]
        return cls(
            group=labels.get("ray.io/node-group", ""),
            market=labels.get("ray.io/market-type", ""),
            cpus=resources.get("CPU", 0.0),
            gpus=resources.get("GPU", 0.0),
        )


class NodeHours:
    """How long nodes of each kind held a run. A price is not known here: hours are what it is
    multiplied with."""

    def __init__(self, before: Iterable[Mapping[str, Any]] = ()) -> None:
        """``before``: the ``rows`` of an earlier driver of the run, which go on to count."""
        self._hours: defaultdict[NodeKind, float] = defaultdict(float)
        for row in before:
            kind = {name: row[name] for name in ("group", "market", "cpus", "gpus")}
            self._hours[NodeKind(**kind)] += row["hours"]

    def add(self, kinds: Iterable[NodeKind], seconds: float) -> None:
        """One node of each of these kinds was in use for so long."""
        for kind in kinds:
            self._hours[kind] += seconds / 3600

    def rows(self) -> list[dict[str, Any]]:
        """Each kind with the hours of its nodes: what status.json keeps."""
        return [{**vars(kind), "hours": hours} for kind, hours in self._hours.items()]

    def totals(self) -> dict[str, float]:
        """Hours of nodes, and of the CPUs and GPUs that these have, whoever used them."""
        found = self._hours.items()
        return {
            "hours": sum(hours for _, hours in found),
            "cpu_hours": sum(kind.cpus * hours for kind, hours in found),
            "gpu_hours": sum(kind.gpus * hours for kind, hours in found),
        }


@dataclass(kw_only=True)
class Nodes:
    """What the driver knows of the nodes of its run. Belongs to one thread."""

    hours: NodeHours = field(default_factory=NodeHours)
    drained: int = 0
    """Nodes that began to drain while they held actors of the run."""
    draining: dict[str, float] = field(default_factory=dict)
    """Node that drains -> when it is taken away, seconds since the epoch."""
    used: dict[str, NodeKind] = field(default_factory=dict)
    """Nodes with actors of the run; the driver's has its coordinator."""
    _homes: dict[str, str] = field(default_factory=dict)
    """Actor -> its node, both by Ray's ids."""
    _surveyed: float = 0.0
    _took: float = 0.0
    """Seconds, by the last survey."""

    @classmethod
    def after(cls, said: Mapping[str, Any]) -> Nodes:
        """Those of a run whose status.json says ``said`` of nodes; nothing is said of a new one."""
        return cls(hours=NodeHours(said.get("kinds", ())), drained=said.get("drained", 0))

    def look(self) -> None:
        """Asks Ray what has changed."""
        draining = draining_nodes()
        news = draining.keys() - self.draining.keys()
        self.draining = draining
        pause = max(SURVEY_SECONDS, min(_SURVEYS_SHARE * self._took, 60.0))
        held = self.used.keys()
        if news or time.monotonic() - self._surveyed > pause:
            self.survey()

        # a learner may have left before the driver hears of the notice
        self.drained += len(news & (held | self.used.keys()))

    def survey(self) -> None:
        """Asks Ray where the run's actors are, and counts the time since it was last asked."""
        now = time.monotonic()
        if self.used:
            self.hours.add(self.used.values(), now - self._surveyed)
        job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
        actors = ray_state.actors(job_id=job, actor_state_name="ALIVE")
        self._homes = {actor: facts["Address"]["NodeID"] for actor, facts in actors.items()}
        homes = set(self._homes.values())
        self.used = {
            node["NodeID"]: NodeKind.of(node)
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] in homes
        }
        self._surveyed = now
        self._took = time.monotonic() - now

    def home(self, actor: ActorHandle) -> str | None:
        """The node of an actor, as of the last survey; None while it has none."""
        return self._homes.get(actor._actor_id.hex())

    def held(self) -> Counter[str]:
        """How many of the run's actors each node holds."""
        return Counter(self._homes.values())

    def seconds_left(self, actor: ActorHandle) -> float | None:
        """How long the node of an actor is still there; None where it does not drain, inf where its
        end is not known."""
        deadline = self.draining.get(self.home(actor) or "")
        return None if deadline is None else deadline - LAST_SECONDS - time.time()

    def facts(self) -> dict[str, float]:
        """Of the metrics line and Ray's metrics: nodes now, nodes that had to go, hours so far."""
        return {
            "nodes/used": len(self.used),
            "nodes/draining": len(self.draining.keys() & self.used.keys()),
            "nodes/drained": self.drained,
            **{f"nodes/{name}": round(hours, 6) for name, hours in self.hours.totals().items()},
        }

    def report(self) -> dict[str, Any]:
        """The same for status.json, with the hours of each kind of node."""
        facts = {name.removeprefix("nodes/"): value for name, value in self.facts().items()}
        return {**facts, "kinds": self.hours.rows()}
