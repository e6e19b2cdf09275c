"""How a reward is fitted on pairs: the settings that ``rlalign fit-reward`` and a run that fits its
own reward anew have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Optimisation(BaseModel):
    """How a stage is trained: AdamW, linear warm-up, then a cosine to 0 over the stage's
    updates."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    updates: int = Field(ge=0, description="optimiser updates")
    lr: float = Field(default=1.0e-3, gt=0.0, description="largest learning rate")
    warmup: int = Field(default=50, ge=0, description="updates over which the rate rises from 0")
    weight_decay: float = Field(
        default=0.02, ge=0.0, description="AdamW's weight decay, of matrices alone"
    )
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="clip on the gradient's norm")


class Fit(Optimisation):
    """Stage 2: the loss on pairs. An update takes ``preferences.pairs_per_round`` pairs."""

    updates: int = Field(
        default=1000, ge=0, description="optimiser updates; 0 leaves the stage out"
    )
    theta: float = Field(
        default=1.0,
        ge=1.0,
        description=(
            "Rao-Kupper's threshold for ties; 1 is Bradley-Terry (preferences.ties says how)"
        ),
    )
    weight_by_prompt: bool = Field(
        default=True, description="each pair counts 1 / pairs of its prompt, as in PickScore"
    )
