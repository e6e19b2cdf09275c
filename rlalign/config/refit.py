"""Settings of a reward that a run fits anew on people's votes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlalign.data.pairs.settings import PreferenceSettings
from rlalign.learning.fit import Fit


class RefitSettings(BaseModel):
    """A reward that is fitted anew while people vote: on all votes that there are when a round
    begins, from the folder that the reward's ``path`` names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    reward: str = Field(
        default="bradley_terry", description="which of the run's rewards, by its name in metrics"
    )
    every: int = Field(default=1, ge=1, description="rounds from one fit to the next")
    preferences: PreferenceSettings = Field(
        description="the store of votes, as ballots, and how a fit reads its pairs"
    )
    held_out: float = Field(
        default=0.1, gt=0.0, lt=1.0, description="share of prompts whose pairs are never trained on"
    )
    fit: Fit = Fit()

    @model_validator(mode="after")
    def _fits_together(self) -> RefitSettings:
        if self.preferences.ballots is None:
            raise ValueError(
                "preferences.ballots is required: a reward is fitted anew on people's votes; for"
                " pairs that do not grow there is rlalign fit-reward"
            )
        if self.fit.theta > 1.0 and self.preferences.ties != "half":
            raise ValueError(
                f"fit.theta > 1 models ties and needs preferences.ties half, got {self.fit.theta}"
                " with ties dropped"
            )
        return self
