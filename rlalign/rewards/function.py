"""Any importable callable as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator

from rlalign.core.registry import UserError, find
from rlalign.rewards.base import Reward, Scorer


class Function(Reward):
    """A function of your own: ``(media_BFCHW, prompts, **arguments)`` -> B numbers, larger is
    better.

    It gets a float32 tensor in [0, 1] of shape (B, F, 3, H, W) and B prompts, and may return a
    list, an array or a tensor of shape (B,); NaN or an exception is a failed score (``on_error``).
    No gradient passes.

    Source: the callable named in the run file.
    """

    call: str = Field(
        description="package.module:function, importable where the rewards are computed"
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments passed with every call"
    )

    @field_validator("call")
    @classmethod
    def _names_both(cls, call: str) -> str:
        module_name, _, attribute = call.partition(":")
        if not all(part.isidentifier() for part in f"{module_name}.{attribute}".split(".")):
            raise ValueError("must read package.module:function")
        return call

    def load(self, device: str) -> Scorer:
        """The scorer. The device is the callable's own affair: media come on the CPU. Raises
        UserError if it is not there."""
        function = find(self.call, f"rewards.{self.title}.call")

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return self._numbers(function(media_BFCHW, prompts, **self.arguments), len(prompts))

        return scorer

    def _numbers(self, returned: Any, count: int) -> torch.Tensor:
        """What the callable returned as (B,) float32."""
        rule = f"rewards.{self.title}: {self.call} must return {count} numbers, one per picture"
        kind = type(returned).__name__
        plain = _detached(returned)
        if isinstance(returned, list | tuple):
            plain = [_detached(one) for one in returned]
        try:
            score_B = torch.from_numpy(np.array(plain, dtype=np.float32))
        except (TypeError, ValueError) as error:
            raise UserError(f"{rule}, got a {kind} ({error})") from error
        if tuple(score_B.shape) != (count,):
            raise UserError(f"{rule}, got a {kind} of shape {tuple(score_B.shape)}")
        return score_B


def _detached(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
