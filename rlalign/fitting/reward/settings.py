"""Settings of a fit-reward run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from rlalign.core.locations import ArchitecturePath, LocalPath, LocalPattern
from rlalign.core.records import Plan
from rlalign.core.registry import UserError, build
from rlalign.data.pairs.reader import PreferenceSettings
from rlalign.data.prompts.base import Prompts
from rlalign.learning.fit import Fit, Optimisation
from rlalign.policies.base import PolicyRecipe
from rlalign.rewards.base import Reward, refuse_latents


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSettings(_Settings):
    """Which open_clip model is fitted, and how much of it."""

    architecture: ArchitecturePath = Field(
        default="tiny", description="tiny, a name of open_clip's, or a JSON file with a model_cfg"
    )
    tokenizer: LocalPath = Field(
        default="", description="folder with a tokenizer; empty is the architecture's own"
    )
    pretrained: LocalPath = Field(
        default="", description="safetensors file of weights to start from; empty starts fresh"
    )
    image_groups: int = Field(
        default=-1,
        ge=-1,
        description="last groups of the image tower that are trained (open_clip's lock); -1 is all",
    )
    text_groups: int = Field(
        default=-1,
        ge=-1,
        description=(
            "last groups of the text tower that are trained (projection, blocks ...); -1 is all"
        ),
    )


class Contrastive(Optimisation):
    """Stage 1, optional: CLIP's contrastive loss (Radford 2021, arXiv:2103.00020) on drawn pictures
    and their captions."""

    updates: int = Field(default=0, ge=0, description="optimiser updates; 0 leaves the stage out")
    batch: int = Field(default=128, ge=2, description="pictures per update")


class FitPreferences(PreferenceSettings):
    """Preference pairs of a fit: from files, from people's votes, or the simulated ones of the run
    folder."""

    made_elsewhere: ClassVar[bool] = True

    path: LocalPattern = Field(
        default="", description="file of pairs, folder or glob; empty where the pairs are simulated"
    )
    upto: int | None = Field(
        default=None,
        ge=1,
        description=(
            "with ballots: the row of the log up to which votes are read; empty is all that there"
            " are when the fit begins"
        ),
    )


def _recipe(shelf: str, place: str) -> BeforeValidator:
    def build_one(value: Any) -> Any:
        return build(shelf, {"name": value} if isinstance(value, str) else value, place)

    return BeforeValidator(build_one)


class Simulate(_Settings):
    """Pairs of a policy's own samples (and drawn pictures), labelled by a hidden utility: a judge
    that is known exactly."""

    utility: tuple[
        SerializeAsAny[Annotated[Reward, _recipe("rewards", "simulate.utility")]], ...
    ] = Field(min_length=1, description="the hidden utility: a weighted sum of rewards")
    policy: SerializeAsAny[Annotated[PolicyRecipe, _recipe("policies", "simulate.policy")]] = Field(
        default="tiny", validate_default=True, description="whose samples are compared"
    )  # type: ignore[assignment]
    prompts: SerializeAsAny[Annotated[Prompts, _recipe("prompts", "simulate.prompts")]] = Field(
        default="shapes", validate_default=True, description="their prompts"
    )  # type: ignore[assignment]
    plan: Plan = Plan()
    pairs: int = Field(
        default=4000, ge=2, description="pairs in all, of the policy's samples and drawn"
    )
    samples_per_prompt: int = Field(
        default=4, ge=2, description="samples of a prompt, each compared with each"
    )
    drawn: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description=(
            "share of pairs of drawn shapes: the caption's scene and one with a fact changed"
        ),
    )
    temperature: float = Field(
        default=0.0,
        ge=0.0,
        description=(
            "labels are drawn with probability sigmoid(difference / temperature); 0 is exact"
        ),
    )
    lanes: int = Field(
        default=2, ge=1, description="threads that sample, each with a replica of the policy"
    )

    @model_validator(mode="after")
    def _judges_pictures(self) -> Simulate:
        refuse_latents(self.utility, "utility", "a set of pairs has")
        return self

    @model_validator(mode="after")
    def _draws_no_clips(self) -> Simulate:
        if self.drawn and self.plan.frames > 1:
            raise ValueError(
                "drawn must be 0 with plan.frames > 1, as what is drawn are pictures, got"
                f" {self.drawn:g} with {self.plan.frames} frames"
            )
        return self


class FitReward(_Settings):
    """Settings of a fit-reward run.

    ``out`` is the run folder: ``pairs.parquet`` where they are simulated or people's votes,
    ``checkpoints/`` to resume from, ``reward/`` (what
    ``rewards: [{name: bradley_terry, path: ...}]`` loads), ``fit.json`` and ``fit.html``.
    """

    seed: int = Field(
        default=0,
        ge=0,
        description="decides the first weights, the pairs' order, and what is simulated",
    )
    out: Path = Field(default=Path("runs/fit_reward"), description="run folder")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="torch device")
    threads: int = Field(
        default=0, ge=0, description="torch threads on the CPU; 0 leaves torch's own number"
    )
    model: ModelSettings = ModelSettings()
    preferences: FitPreferences = FitPreferences()
    simulate: Simulate | None = Field(
        default=None, description="make the pairs, where preferences.path names none"
    )
    held_out: float = Field(
        default=0.1, gt=0.0, lt=1.0, description="share of prompts whose pairs are never trained on"
    )
    contrastive: Contrastive = Contrastive()
    fit: Fit = Fit()
    checkpoint_every: int = Field(default=250, ge=1, description="updates between two checkpoints")

    @model_validator(mode="after")
    def _fits_together(self) -> FitReward:
        votes = self.preferences.ballots is not None
        if (self.simulate is None) == (not (self.preferences.path or votes)):
            raise UserError(
                "preferences.path or simulate must say where the pairs come from, and not both, got"
                f" {'neither' if self.simulate is None else 'both'} (preferences.ballots may stand"
                " for path)"
            )
        if self.preferences.upto is not None and not votes:
            raise UserError(
                "preferences.upto is about preferences.ballots, got"
                f" {self.preferences.upto} without ballots"
            )
        if self.fit.theta > 1.0 and self.preferences.ties != "half":
            raise UserError(
                f"fit.theta > 1 models ties and needs preferences.ties half, got {self.fit.theta}"
                " with ties dropped"
            )
        return self

    @property
    def pairs(self) -> PreferenceSettings:
        """Where the pairs are read from."""
        path = self.preferences.path or str(self.out / "pairs.parquet")
        settings = {**self.preferences.model_dump(exclude={"upto"}), "path": path, "ballots": None}
        return PreferenceSettings.model_validate(settings)
