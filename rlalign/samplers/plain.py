"""Sampling without any method: what all others are compared with."""

from __future__ import annotations

from rlalign.core.records import Plan, Unit
from rlalign.engine import Engine, advance_rows
from rlalign.samplers.base import Result, Sampler


class Plain(Sampler):
    """The plan's own sampler, one sample a picture.

    Source: Ho 2020, arXiv:2006.11239; Song 2020, arXiv:2010.02502.
    """

    def sample(self, engine: Engine, unit: Unit) -> Result:
        return Result(latents=advance_rows(engine, unit, None, 0, unit.plan.steps).x)

    def looks(self, plan: Plan) -> int:
        return plan.steps
