"""torch's AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.learning.optimizers.base import Optimizer


class AdamW(Optimizer):
    """AdamW, torch's: two moments a number, and decay apart from them.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101.
    """

    can_spread: ClassVar[bool] = True

    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="the moments' decays")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=1e-4, ge=0, description="decoupled weight decay")

    def build(self, groups: Sequence[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        own = [dict(group) for group in groups]
        return torch.optim.AdamW(
            own, lr=lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )

    def bytes_of_state(self, parameters: Sequence[torch.Tensor]) -> int:
        return sum(2 * p.numel() * p.element_size() for p in parameters)

    def bytes_of_step(self, parameters: Sequence[torch.Tensor], device: str) -> int:
        # on a GPU all weights at once, with a root of every second moment
        if device == "cpu":
            return super().bytes_of_step(parameters, device)
        return sum(p.numel() * p.element_size() for p in parameters)
