"""The KL to the pretrained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.learning.limits.base import Limit


class KL(Limit):
    """The KL to the pretrained model, ``kl/per_step_gaussian``, is above ``most``.

    Source: Fan et al. 2023, arXiv:2305.16381, lemma 4.2 (the KL that is bounded).
    """

    most: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="largest KL to the pretrained model, nats per latent element and step",
    )

    def refuse_unmeasured(self, place: str, held_out: Sequence[str], plan: Plan) -> None:
        if plan.eta == 0:
            raise UserError(
                f"{place}: kl needs steps with noise, whose KL it is, got plan.eta 0; watch a"
                " held-out reward or the diversity"
            )

    def observe(self, summary: Mapping[str, float], seen: dict[str, Any]) -> str:
        found = summary["kl/per_step_gaussian"]
        if not found > self.most:
            return ""
        return f"the KL to the pretrained model is {found:.4g}, above {self.most:g}"
