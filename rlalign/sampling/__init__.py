"""``rlalign sample``: pictures by a test-time method, beside plain sampling and best-of-N at the
same cost.

settings.py  the sample file: policy (a run folder too), plan, prompts, rewards, method, budget
compare.py   the method and its baselines on one engine, scored on the same prompts and noise
output.py    what is written: pictures, scores, cost; report.html

May import everything below it; no Ray.
"""

from __future__ import annotations

from rlalign.alignment.models import ready_policy
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.sampling.compare import check, run_sample, sample_local
from rlalign.sampling.output import SO_FAR
from rlalign.sampling.settings import Sample, load_sample, parse_sample

__all__ = [
    "SO_FAR",
    "LiveRewards",
    "LocalEngine",
    "Sample",
    "check",
    "load_sample",
    "parse_sample",
    "ready_policy",
    "run_sample",
    "sample_local",
]
