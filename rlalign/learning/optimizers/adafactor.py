"""transformers' Adafactor, with a learning rate of its own.

Relative steps and scaling by the weights' size are off, as the published Diffusion-DPO trainer has
it: torch's own always scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field

from rlalign.learning.optimizers.base import Optimizer


class Adafactor(Optimizer):
    """Adafactor, transformers': its state is a row and a column of second moments a matrix.

    Source: Shazeer & Stern 2018, arXiv:1804.04235.
    """

    weight_decay: float = Field(default=1e-4, ge=0, description="decoupled weight decay")

    def build(self, groups: Sequence[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor as Published

        return Published(
            [dict(group) for group in groups],
            lr=lr,
            weight_decay=self.weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
        )

    def bytes_of_state(self, parameters: Sequence[torch.Tensor]) -> int:
        return sum(_kept(p) * p.element_size() for p in parameters)


def _kept(parameter: torch.Tensor) -> int:
    """Numbers: the mean over the last dimension, and that over the one before it; of a vector all
    second moments."""
    if parameter.ndim < 2:
        return parameter.numel()
    *outer, rows, columns = parameter.shape
    return torch.Size(outer).numel() * (rows + columns)
