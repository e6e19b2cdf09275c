"""What a run tells Ray's metrics, and so Prometheus: every number of a metrics line as a gauge, and what only pools know.

``ray_rlalign_reward_total_mean{run}`` and so on; the names are listed by ``metric_names``. One object a process; metrics
are made when they are first set, because Ray must run by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTERS = {
    "rlalign_samples_total": ("samples ordered from the rollout pool", ("run",)),
    "rlalign_units_total": ("units of work produced and scored", ("run", "stream")),
    "rlalign_units_retried_total": ("units that were given out again: a worker died, hung or failed", ("run", "role")),
    "rlalign_reward_errors_total": ("scores that failed or were not finite", ("run", "reward")),
}
POOL_GAUGES = {
    "rlalign_queue_depth": ("units ordered and not finished", ("run",)),
    "rlalign_workers": ("workers by role and state", ("run", "role", "state")),
}
HISTOGRAMS = {
    "rlalign_unit_seconds": ("seconds a rollout worker took for a unit", ("run",)),
    "rlalign_reward_seconds": ("seconds a reward worker took for a unit", ("run", "reward")),
}
BOUNDARIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def gauge_name(key: str) -> str:
    """The gauge of a key of a metrics line: ``reward/total/mean`` -> ``rlalign_reward_total_mean``."""
    return "rlalign_" + "".join(c if c.isalnum() else "_" for c in key)


def metric_names() -> frozenset[str]:
    """Names as Prometheus sees them, without a histogram's endings; the gauges of metrics lines come on top."""
    return frozenset(f"ray_{name}" for name in (*COUNTERS, *POOL_GAUGES, *HISTOGRAMS))


class Gauges:
    """Ray's metrics of one run."""

    def __init__(self, run: str) -> None:
        self._run, self._made = run, dict[str, Any]()

    def line(self, line: Mapping[str, Any]) -> None:
        """A metrics line, or an evaluation, whose keys get ``evaluation/`` in front."""
        from ray.util.metrics import Gauge

        evaluation = {f"evaluation/{key}": value for key, value in line.get("evaluation", {}).items()}
        for key, value in {**line, **evaluation}.items():
            if isinstance(value, int | float) and value == value:
                name = gauge_name(key)
                gauge = self._made.get(name) or self._made.setdefault(
                    name, Gauge(name, description=f"rlalign metric {key}", tag_keys=("run",))
                )
                gauge.set(value, tags={"run": self._run})

    def count(self, name: str, by: float = 1.0, **tags: str) -> None:
        """Adds to one of COUNTERS."""
        from ray.util.metrics import Counter

        if by:
            self._of(Counter, name, *COUNTERS[name]).inc(by, tags={"run": self._run, **tags})

    def set(self, name: str, value: float, **tags: str) -> None:
        """Sets one of POOL_GAUGES."""
        from ray.util.metrics import Gauge

        self._of(Gauge, name, *POOL_GAUGES[name]).set(value, tags={"run": self._run, **tags})

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Adds to one of HISTOGRAMS."""
        from ray.util.metrics import Histogram

        text, keys = HISTOGRAMS[name]
        if name not in self._made:
            self._made[name] = Histogram(name, description=text, boundaries=list(BOUNDARIES), tag_keys=keys)
        self._made[name].observe(max(value, 0.0), tags={"run": self._run, **tags})

    def _of(self, kind: Any, name: str, text: str, keys: tuple[str, ...]) -> Any:
        if name not in self._made:
            self._made[name] = kind(name, description=text, tag_keys=keys)
        return self._made[name]
