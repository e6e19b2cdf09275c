"""Best-of-N, with or without progressive pruning of seeds."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Plan, Unit
from rlalign.engine import Engine, advance_and_score_rows, expand
from rlalign.samplers.base import Result, Sampler, best, group_rows, refuse_unscored, take


class BestOfN(Sampler):
    """The best of N samples by reward, with or without dropping the worst on the way.

    ``prune`` begins 2N, keeps N at a quarter and N / 2 at half of the steps. Pruning ranks by the
    reward of the clean sample seen in the step before, and takes as many denoiser calls as N
    samples.

    Source: Stiennon 2020, arXiv:2009.01325 (best of N); progressive seed pruning: arXiv:2607.21591.
    """

    width: ClassVar[str] = "n"

    n: int = Field(default=4, ge=1, description="samples a picture")
    prune: bool = Field(
        default=False, description="begin with 2N and drop the worst on the way, at equal cost"
    )

    def sample(self, engine: Engine, unit: Unit) -> Result:
        steps = unit.plan.steps
        stages = self._stages(steps)
        count = stages[0][1]
        rows = expand(unit, count)
        x = None
        total_BN = np.zeros((0, count))
        # from one stage to the next with the seeds that are kept
        for number, (start, _) in enumerate(stages):
            stop = stages[number + 1][0] if number + 1 < len(stages) else steps
            reached, scores = advance_and_score_rows(engine, rows, x, start, stop)
            x = reached.x
            total_BN = group_rows(scores.total_B, count)
            if number + 1 < len(stages):
                refuse_unscored(np.isfinite(total_BN), x)
                kept = stages[number + 1][1]
                keep = _keep(total_BN, kept)
                x = x[torch.from_numpy(keep)]
                rows = rows.take(keep.tolist())
                count = kept
        # the best of what is left
        assert x is not None
        return Result(latents=take(x, best(total_BN, x), count))

    def _stages(self, steps: int) -> list[tuple[int, int]]:
        """(first step, seeds from there on)."""
        if not self.prune or steps < 4:
            return [(0, self.n)]
        return [(0, 2 * self.n), (steps // 4, self.n), (steps // 2, max(self.n // 2, 1))]

    def looks(self, plan: Plan) -> int:
        stages = [*self._stages(plan.steps), (plan.steps, 0)]
        return sum((stages[i + 1][0] - stages[i][0]) * stages[i][1] for i in range(len(stages) - 1))


def _keep(total_BN: np.ndarray, count: int) -> np.ndarray:
    """Rows of the ``count`` best of each group, in their old order."""
    ranked_BN = np.argsort(
        -np.where(np.isfinite(total_BN), total_BN, -np.inf), axis=1, kind="stable"
    )[:, :count]
    groups, size = total_BN.shape
    return (np.sort(ranked_BN, axis=1) + np.arange(groups)[:, None] * size).ravel()
