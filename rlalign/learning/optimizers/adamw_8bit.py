"""bitsandbytes' AdamW in 8 bits: the extra ``8bit``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field

from rlalign.core.registry import UserError, read_reason
from rlalign.learning.optimizers.base import Optimizer

_SMALL = 4096
"""Numbers of a tensor below which bitsandbytes keeps its moments in 32 bits."""
_BLOCK = 256
"""Numbers that share a scale in 8 bits, and entries of the map from 8 bits to numbers."""


class AdamW8bit(Optimizer):
    """AdamW, bitsandbytes': moments in bytes (CUDA, the extra 8bit).

    Source: Dettmers et al. 2022, arXiv:2110.02861.
    """

    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="the moments' decays")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=1e-4, ge=0, description="decoupled weight decay")

    def refuse_device(self, device: str) -> None:
        if not device.startswith("cuda"):
            raise UserError(
                f"learner.optimizer adamw_8bit needs a CUDA device, got {device!r}; set"
                " runtime.device to cuda, or take adamw or adafactor"
            )

    def refuse_missing(self) -> None:
        try:
            import bitsandbytes  # type: ignore[import-not-found]  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            raise UserError(
                f"learner.optimizer adamw_8bit needs bitsandbytes ({read_reason(error)}); install"
                " rlalign[8bit], or take adamw or adafactor"
            ) from error

    def build(self, groups: Sequence[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit as Published  # type: ignore[import-not-found]

        own = [dict(group) for group in groups if group["params"]]
        return Published(own, lr=lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)

    def bytes_of_state(self, parameters: Sequence[torch.Tensor]) -> int:
        return sum(_bytes_of(p.numel()) for p in parameters)


def _bytes_of(count: int) -> int:
    """Of so many numbers: a byte a moment, a scale a block, and the two maps, which all tensors
    share."""
    if count < _SMALL:
        return 2 * 4 * count
    return 2 * (count + 4 * -(-count // _BLOCK))
