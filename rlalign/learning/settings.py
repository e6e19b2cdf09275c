"""Settings of the learner."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, SerializeAsAny

from rlalign.core.registry import Before, plugin_field
from rlalign.core.spread import Spread
from rlalign.learning.optimizers.adamw import AdamW
from rlalign.learning.optimizers.base import Optimizer

_Optimizer = Annotated[Optimizer, plugin_field("optimizers", "learner.optimizer")]


class LearnerSettings(Spread):
    """How weights are updated: the rule that changes them, how large its steps are, and how many
    there are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = Field(default=1e-4, gt=0, allow_inf_nan=False, description="learning rate")
    optimizer: SerializeAsAny[_Optimizer] = Field(
        default_factory=AdamW, description="the rule that changes weights"
    )
    warmup: Annotated[int, Before(0)] = Field(
        default=0,
        ge=0,
        description=(
            "updates over which the rate rises in a line from 0; 0 is none (the first of n updates"
            " has rate 0, as in diffusers)"
        ),
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="gradients are scaled down to this global norm"
    )
    epochs: int = Field(default=1, ge=1, description="times a round's samples are used")
    updates_per_round: int = Field(
        default=2, ge=1, description="optimiser updates per epoch; must divide the units of a round"
    )
    steps_per_pass: int = Field(
        default=1,
        ge=1,
        description="denoising steps in one forward pass; 1 keeps the rollout's batch shape",
    )
    shards: int = Field(
        default=1,
        ge=1,
        description="parts whose gradients are summed apart; they run side by side on a CPU",
    )
    shard: Annotated[Literal["none", "base", "all"], Before("none")] = Field(
        default="none",
        description=(
            "base spreads the frozen denoiser under a LoRA over the learner's workers (FSDP2): the"
            " same numbers, and its memory divided by their number; all does so where all weights"
            " are trained, with gradients, moments and copies: the same numbers up to rounding"
        ),
    )
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="weight average used to evaluate and export; 0 is off"
    )

    def share_of_rate(self, update: int) -> float:
        """Which share of ``lr`` the update after ``update`` others has: linear warm-up, then
        constant."""
        return min(1.0, update / self.warmup) if self.warmup else 1.0
