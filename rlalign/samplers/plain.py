"""Sampling without any method: what all others are compared with."""

from __future__ import annotations

from rlalign.records import Plan, Unit
from rlalign.samplers.base import Found, Sampler, passes
from rlalign.work import Engine, advance_rows


class Plain(Sampler):
    """The plan's own sampler, one sample a picture.

    Source: Ho 2020, arXiv:2006.11239; Song 2020, arXiv:2010.02502.
    """

    def sample(self, engine: Engine, unit: Unit) -> Found:
        return Found(latents=advance_rows(engine, unit, None, 0, unit.plan.steps).x)

    def calls(self, plan: Plan) -> int:
        return passes(plan) * plan.steps
