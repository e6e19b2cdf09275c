"""What a reward is: a recipe that loads into a scorer, and how several of them make one number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator

from rlalign.core.media import as_floats
from rlalign.core.records import Space
from rlalign.core.registry import Before, Recipe, UserError
from rlalign.rewards._frames import Frames, FramesScorer

Combine = Literal["sum", "normalised", "product"]
"""How several rewards make one number."""


class Scorer(Protocol):
    """A loaded reward: samples and one prompt per sample -> float32 scores of shape (B,).

    The samples are ``media_BFCHW`` float32 in [0, 1], or clean latents (B, *latent) float32 where
    the reward sees those.
    """

    def __call__(self, media_BFCHW: torch.Tensor, prompts: Sequence[str], /) -> torch.Tensor: ...


class FittedScorer(Scorer, Protocol):
    """A loaded reward of ``rlalign fit-reward``: it takes other weights of the same network."""

    def set_weights(self, tensors: Mapping[str, torch.Tensor], /) -> None:
        """Takes over weights by their names in the folder's safetensors file."""
        ...


class Reward(Recipe):
    """Base of a reward: one number per picture; larger is better. ``load`` gives the live
    scorer."""

    shelf: ClassVar[str] = "rewards"
    differentiable: ClassVar[bool] = False
    sees: ClassVar[Space] = "media"
    """What its scorer is given: media, or the policy's clean latents."""
    of_clips: ClassVar[bool] = False
    """Whether it compares a clip's frames, and so cannot be asked about one alone."""

    weight: float = Field(
        default=1.0, allow_inf_nan=False, description="factor in the weighted total"
    )
    label: str = Field(default="", description="name in the metrics; the plug-in's name when empty")
    on_error: Literal["raise", "drop"] | float = Field(
        default="raise",
        description=(
            "what a failing or non-finite score does: raise, drop the sample, or this value"
        ),
    )
    at_least: Annotated[float | None, Before(None)] = Field(
        default=None,
        allow_inf_nan=False,
        description="a constraint: a sample below it gets the lowest reward of its prompt's",
    )
    units_per_call: Annotated[int, Before(1)] = Field(
        default=1,
        ge=1,
        description=(
            "on Ray: units that wait for a worker and are scored in one call, at most; the scores"
            " of a network then differ in their last bits"
        ),
    )
    frames: Annotated[Frames | None, Before(None)] = Field(
        default=None,
        description=(
            "of a clip: mean, min, first, or {quantile: q} of the scores of its frames, each seen"
            " alone; null: what the reward makes of a clip, mostly the mean"
        ),
    )

    @model_validator(mode="after")
    def _of_frames(self) -> Reward:
        if self.of_clips and self.frames is not None:
            raise ValueError(
                f"frames has no meaning for {self.title}, which compares the frames of a clip;"
                " leave it out"
            )
        if self.sees == "latent" and self.frames is not None:
            raise ValueError(
                f"frames has no meaning for {self.title}, which sees latents and no frames; leave"
                " it out"
            )
        return self

    @property
    def title(self) -> str:
        """The name under which the score is logged."""
        return self.label or self.name.rsplit(":", 1)[-1]

    @property
    def fitted(self) -> Path | None:
        """The folder of ``rlalign fit-reward`` that it loads; None where it is no such reward. One
        that has it loads a ``FittedScorer``."""
        return None

    def load(self, device: str) -> Scorer:
        """The live scorer on ``device``, of whole clips."""
        raise NotImplementedError

    def load_scorer(self, device: str) -> Scorer:
        """The live scorer on ``device``, which sees frames as ``frames`` says; what a run asks."""
        scorer = self.load(device)
        if self.frames is None:
            return scorer
        return FramesScorer(self.title, scorer, self.frames)


def score(
    reward: Reward, scorer: Scorer, samples_B: np.ndarray, prompts: Sequence[str]
) -> np.ndarray:
    """Raw scores, float32 of shape (B,), of what the reward sees, uint8 media or float32 latents,
    under its own error policy.

    A sample to be dropped has score NaN. A scorer that raises under ``on_error: drop`` or a value
    is asked again sample by sample, so that one bad picture does not take the others with it.
    """
    given_B = as_floats(samples_B) if reward.sees == "media" else torch.tensor(samples_B)
    # a failure ends the run
    if reward.on_error == "raise":
        score_B = _checked(reward, scorer(given_B, prompts), len(prompts))
        bad = [i for i, s in enumerate(score_B) if not math.isfinite(s)]
        if bad:
            raise UserError(
                f"rewards.{reward.title} returned {score_B[bad[0]]} for {prompts[bad[0]]!r}; "
                "set its on_error to drop or to a number to go on"
            )
        return score_B
    # or is a missing score, or a value
    try:
        score_B = _checked(reward, scorer(given_B, prompts), len(prompts))
    except UserError:
        raise
    except Exception:  # whatever a user's scorer raises, its stated policy answers for it
        score_B = np.array(
            [_one(scorer, given_B[i : i + 1], p) for i, p in enumerate(prompts)],
            dtype=np.float32,
        )
    fill = math.nan if reward.on_error == "drop" else float(reward.on_error)
    return np.where(np.isfinite(score_B), score_B, np.float32(fill)).astype(np.float32)


def _one(scorer: Scorer, given_1: torch.Tensor, prompt: str) -> float:
    try:
        return float(scorer(given_1, [prompt])[0])
    except Exception:  # counted by the caller as a missing score
        return math.nan


def _checked(reward: Reward, score_B: torch.Tensor, count: int) -> np.ndarray:
    if tuple(score_B.shape) != (count,):
        raise UserError(
            f"rewards.{reward.title} must return shape ({count},), got {tuple(score_B.shape)}"
        )
    return score_B.detach().to(torch.float32).cpu().numpy()


def total(
    rewards: Sequence[Reward], raw: Mapping[str, np.ndarray], combine: Combine = "sum"
) -> np.ndarray:
    """The weighted sum of raw scores, or the product of scores to the power of their weights,
    float32 of shape (B,); NaN where any score of the sample is missing.

    A product needs scores >= 0 (UserError). Under ``normalised`` the total is the weighted sum: it
    is shown, and what is learned from are advantages of each reward.
    """
    if combine == "product":
        return _product(rewards, raw)
    parts = [np.float32(r.weight) * raw[r.title] for r in rewards]
    return np.asarray(np.sum(np.stack(parts), axis=0, dtype=np.float32))


def _product(rewards: Sequence[Reward], raw: Mapping[str, np.ndarray]) -> np.ndarray:
    out_B = np.ones(len(raw[rewards[0].title]))
    for reward in rewards:
        score_B = raw[reward.title].astype(np.float64)
        if (score_B < 0).any():
            raise UserError(
                f"rewards.{reward.title} must be >= 0 under combine: product, got"
                f" {np.nanmin(score_B):g}; take combine: normalised or sum, or a reward without"
                " negative scores"
            )
        # a weight of 0 leaves a score out, and not the sample that has none
        out_B = out_B * np.where(np.isnan(score_B), np.nan, score_B**reward.weight)
    return out_B.astype(np.float32)


def refuse_constraints(rewards: Sequence[Reward], place: str) -> None:
    """Raises UserError where a reward has a constraint at a place that compares no samples of a
    prompt."""
    for reward in rewards:
        if reward.at_least is not None:
            raise UserError(
                f"{place}.{reward.title}.at_least is for rewards that a run is trained on, got"
                f" {reward.at_least:g}; leave it out here"
            )


def spaces_of(rewards: Sequence[Reward]) -> frozenset[Space]:
    """Where these rewards see samples."""
    return frozenset(reward.sees for reward in rewards)


def refuse_latents(rewards: Sequence[Reward], place: str, what: str) -> None:
    """Raises UserError where a reward sees latents at a place that has media alone; ``what`` is
    that place in words."""
    for reward in rewards:
        if reward.sees == "latent":
            raise UserError(
                f"{place} must see media: {what} no latents, which {reward.title} is a reward of;"
                " name another reward"
            )
