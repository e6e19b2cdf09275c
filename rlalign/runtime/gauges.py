"""What a run tells Ray's metrics, and so Prometheus: every number of a metrics line as a gauge, and
what only pools know. What the page of ``rlalign vote`` tells them beside a cluster; a campaign's
name then stands for a run's.

``ray_rlalign_reward_total_mean{run}`` and so on; the names are listed by ``metric_names``. One
object a process; metrics are made when they are first set, because Ray must run by then.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

_Tagged = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's name and its tags but for the run."""

COUNTERS = {
    "rlalign_samples_total": (
        "samples produced and scored; made once more after a learner's death they count once",
        ("run",),
    ),
    "rlalign_units_total": ("units of work produced and scored", ("run", "stream")),
    "rlalign_units_retried_total": (
        "units that were given out again: a worker died, hung or failed",
        ("run", "role"),
    ),
    "rlalign_reward_errors_total": ("scores that failed or were not finite", ("run", "reward")),
    "rlalign_votes_total": ("votes on a campaign's page, skips and undone ones aside", ("run",)),
}
POOL_GAUGES = {
    "rlalign_queue_depth": ("units ordered and not finished", ("run",)),
    "rlalign_workers": ("workers by role and state", ("run", "role", "state")),
    "rlalign_nodes": (
        "nodes with actors of the run: used, and of these draining",
        ("run", "state"),
    ),
    "rlalign_pairs_ready": ("pairs of a campaign that wait for a vote", ("run",)),
    "rlalign_ballots_open": ("ballots that people have before them", ("run",)),
}
HISTOGRAMS = {
    "rlalign_unit_seconds": ("seconds a rollout worker took for a unit", ("run",)),
    "rlalign_reward_seconds": ("seconds a reward worker took for a unit", ("run", "reward")),
    "rlalign_drawing_seconds": (
        "seconds until a batch of a campaign's pictures was there",
        ("run",),
    ),
}
BOUNDARIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def gauge_name(key: str) -> str:
    """The gauge of a key of a metrics line: ``reward/total/mean`` ->
    ``rlalign_reward_total_mean``."""
    return "rlalign_" + "".join(c if c.isalnum() else "_" for c in key)


def metric_names() -> frozenset[str]:
    """Names as Prometheus sees them, without a histogram's endings; the gauges of metrics lines
    come on top."""
    return frozenset(f"ray_{name}" for name in (*COUNTERS, *POOL_GAUGES, *HISTOGRAMS))


@contextlib.contextmanager
def shown(what: str) -> Iterator[None]:
    """Shows on the dashboard what this process does: a line of its log at the start, a span of the
    timeline at the end.

    The names of Ray's tasks, and of processes, are labels of Ray's own metrics: a name per unit
    would make series for ever (16 kB a call in the caller, Ray 2.60). Lines and spans are neither.
    """
    # ray.timeline() draws these spans; Ray has no public way to add one
    from ray._private import worker

    here: Any = worker.global_worker
    print(what, flush=True)
    with here.core_worker.profile_event(what.encode("ascii", "replace"), None):
        yield


class Gauges:
    """Ray's metrics of one run. Counts and observations wait for ``flush``, so that a unit does not
    wait for them."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._made = dict[str, Any]()
        self._counted: defaultdict[_Tagged, float] = defaultdict(float)
        self._observed: list[tuple[_Tagged, float]] = []

    def line(self, line: Mapping[str, Any]) -> None:
        """A metrics line, or an evaluation, whose keys get ``evaluation/`` in front."""
        from ray.util.metrics import Gauge

        evaluation = {
            f"evaluation/{key}": value for key, value in line.get("evaluation", {}).items()
        }
        for key, value in {**line, **evaluation}.items():
            if isinstance(value, int | float) and value == value:
                name = gauge_name(key)
                gauge = self._made.get(name) or self._made.setdefault(
                    name, Gauge(name, description=f"rlalign metric {key}", tag_keys=("run",))
                )
                gauge.set(value, tags={"run": self._run})
        self.flush()

    def count(self, name: str, by: float = 1.0, **tags: str) -> None:
        """Adds to one of COUNTERS."""
        if by:
            self._counted[name, tuple(tags.items())] += by

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Adds to one of HISTOGRAMS."""
        self._observed.append(((name, tuple(tags.items())), max(value, 0.0)))

    def set(self, name: str, value: float, **tags: str) -> None:
        """Sets one of POOL_GAUGES."""
        from ray.util.metrics import Gauge

        self._of(Gauge, name, *POOL_GAUGES[name]).set(value, tags={"run": self._run, **tags})

    def flush(self) -> None:
        """Hands over what was counted and observed."""
        from ray.util import metrics

        counted = self._counted
        self._counted = defaultdict(float)
        for (name, tags), by in counted.items():
            self._of(metrics.Counter, name, *COUNTERS[name]).inc(
                by, tags={"run": self._run, **dict(tags)}
            )
        observed = self._observed
        self._observed = []
        for (name, tags), value in observed:
            self._of(
                metrics.Histogram, name, *HISTOGRAMS[name], boundaries=list(BOUNDARIES)
            ).observe(value, tags={"run": self._run, **dict(tags)})

    def _of(self, kind: Any, name: str, text: str, keys: tuple[str, ...], **settings: Any) -> Any:
        if name not in self._made:
            self._made[name] = kind(name, description=text, tag_keys=keys, **settings)
        return self._made[name]
