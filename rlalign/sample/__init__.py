"""``rlalign sample``: pictures by a test-time method, beside plain sampling and best-of-N at the same cost.

settings.py  the sample file: policy (a run folder too), plan, prompts, rewards, method, budget
engine.py    pieces of work on threads of this process; the rewards where they are loaded (``rlalign.runtime`` has both on Ray)
stage.py     the method and its baselines on one engine, scored on the same prompts and noise
output.py    what is written: pictures, scores, cost; report.html

May import everything below ``loop``; no Ray.
"""

from __future__ import annotations

from rlalign.sample.engine import LiveRewards, LocalEngine, perform, ready_policy
from rlalign.sample.settings import Sample, load_sample, parse_sample
from rlalign.sample.stage import check, run_sample, sample_local

__all__ = [
    "LiveRewards",
    "LocalEngine",
    "Sample",
    "check",
    "load_sample",
    "parse_sample",
    "perform",
    "ready_policy",
    "run_sample",
    "sample_local",
]
