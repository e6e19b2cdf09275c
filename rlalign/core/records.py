"""The records that travel between rooms: frozen, keyword-only, the shape in each field's docstring.

Letters: B samples, K denoising steps, F frames, C H W, P prompts, G samples per prompt, L tokens, D
width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlalign.core.registry import Before

if TYPE_CHECKING:
    import torch

StepRuleName = Literal["ddim", "ddpm", "flow_ode", "flow_sde", "flow_dance", "flow_cps"]
WindowPlace = Literal["first_half", "anywhere", "end"]
Space = Literal["media", "latent"]
"""Where samples are seen: decoded to media, or as the clean latents that they are."""
MEDIA: frozenset[Space] = frozenset({"media"})


class Plan(BaseModel):
    """How a trajectory is made. It travels inside the trajectory, so replay cannot use other
    numbers than the rollout did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=10, ge=1, le=1000, description="denoising steps K")
    rule: StepRuleName = Field(
        default="ddim", description="step rule; those that begin with flow_ are for flow models"
    )
    eta: float = Field(
        default=1.0,
        ge=0.0,
        allow_inf_nan=False,
        description="noise: 0 is the ODE, 1 the DDPM posterior (ddim)",
    )
    guidance: float = Field(
        default=1.0,
        ge=0.0,
        allow_inf_nan=False,
        description="classifier-free guidance scale; at 1 and below there is none, as in diffusers",
    )
    height: int = Field(default=0, ge=0, description="pixels; 0 is the policy's own size")
    width: int = Field(default=0, ge=0, description="pixels; 0 is the policy's own size")
    frames: int = Field(default=1, ge=1, description="1 is a picture")
    window: int = Field(
        default=0,
        ge=0,
        description="noise in this many neighbouring steps only; 0 is in all steps",
    )
    window_place: Annotated[WindowPlace, Before("first_half")] = Field(
        default="first_half",
        description=(
            "where the window lies: drawn for each round within the first half or anywhere, or the"
            " last steps (end)"
        ),
    )
    min_std: Annotated[float, Before(0.0)] = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="least std of a step with noise, in sampling and log-probs; 0 is none",
    )

    @model_validator(mode="after")
    def _window_fits(self) -> Plan:
        half = self.window_place == "first_half"
        most = self.steps // 2 if half else self.steps
        if self.window > most:
            which = f"the first half of {self.steps} steps" if half else "the plan's steps"
            raise ValueError(
                f"window must be <= {most}, {which}, got {self.window}; 0 makes every step noisy"
            )
        if not self.window and not half:
            raise ValueError(
                f"window must be > 0 with window_place {self.window_place}, got 0; leave"
                " window_place out"
            )
        return self

    @model_validator(mode="after")
    def _has_noise_to_raise(self) -> Plan:
        if self.min_std and (self.eta == 0.0 or self.rule == "flow_ode"):
            raise ValueError(
                "min_std must be 0 where steps take no noise (eta 0, or the rule flow_ode), got"
                f" {self.min_std:g}"
            )
        return self


def is_guided(guidance: float) -> bool:
    """Whether a guidance scale asks for the empty caption's pass too. At 1 and below it does not,
    as in diffusers' pipelines."""
    return guidance > 1.0


class UnitKey(NamedTuple):
    """A unit of work. It always holds the same prompts and the same noise, whoever computes it."""

    stream: str
    """"train" or "evaluate": units of different streams never share noise."""
    round: int
    index: int

    def __str__(self) -> str:
        return f"{self.stream}/{self.round}/{self.index}"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What a rollout worker is asked to do: B samples under one plan."""

    key: UnitKey
    prompts: tuple[str, ...]
    """B prompts."""
    prompt_ids: tuple[int, ...]
    """B stable numbers of the prompts."""
    sample_ids: tuple[int, ...]
    """B numbers that tell samples of one prompt apart; part of the noise key."""
    seed: int
    plan: Plan

    @classmethod
    def of_rows(
        cls, key: UnitKey, rows: Sequence[tuple[int, str, int]], seed: int, plan: Plan
    ) -> Unit:
        """A unit of rows (prompt's number, prompt, sample's number)."""
        ids, prompts, samples = zip(*rows, strict=True)
        return cls(
            key=key, prompts=prompts, prompt_ids=ids, sample_ids=samples, seed=seed, plan=plan
        )

    def take(self, rows: Sequence[int]) -> Unit:
        """These rows; their noise is what it was."""
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in rows),
            prompt_ids=tuple(self.prompt_ids[i] for i in rows),
            sample_ids=tuple(self.sample_ids[i] for i in rows),
        )

    def with_plan(self, **changes: Any) -> Unit:
        """The same rows under the plan with these changes."""
        return replace(self, plan=self.plan.model_copy(update=changes))


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One unit, denoised. Arrays are numpy and may be read-only views of shared memory: clone
    before writing."""

    unit: Unit
    policy_version: int
    latents_BK1: np.ndarray
    """(B, K+1, *latent) float32: x_T first, the final latent last. Under a plan with a window only
    those that ``kept`` names."""
    log_prob_BK: np.ndarray
    """(B, K) float32, nats per latent element (mean over elements); 0 where the step is
    deterministic."""
    stochastic_K: np.ndarray
    """(K,) bool: False where a step has no density."""

    def __post_init__(self) -> None:
        # float16 near |log p| = 1.4 has a spacing of 9.8e-4: coarser than any published clip range
        if self.log_prob_BK.dtype != np.float32:
            raise TypeError(
                f"log_prob must be float32, got {self.log_prob_BK.dtype}; take it in float32 and"
                " keep it so"
            )

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the latents that are there, in order; 0 is x_T. Under a plan with a window
        they are those of its steps, and the last."""
        return kept_latents(self.unit.plan, self.stochastic_K.tolist())


def kept_latents(plan: Plan, stochastic: Sequence[bool]) -> tuple[int, ...]:
    """Numbers of the latents that a trajectory under this plan keeps, of which ``stochastic`` says
    which steps have a density."""
    everything = range(plan.steps + 1)
    return tuple(sorted({*moved_latents(stochastic), plan.steps} if plan.window else everything))


def moved_latents(steps: Sequence[bool]) -> tuple[int, ...]:
    """Numbers of the latents that the chosen steps of a chain start from or go to, in order."""
    chosen = [k for k, is_chosen in enumerate(steps) if is_chosen]
    return tuple(sorted({*chosen, *(k + 1 for k in chosen)}))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A unit with its scores: the small facts, and the trajectory where this process needs it."""

    unit: Unit
    policy_version: int
    raw: Mapping[str, np.ndarray]
    """Reward title -> (B,) float32 raw scores; NaN where the sample is to be dropped."""
    total_B: np.ndarray
    """(B,) float32 combination of the raw scores; NaN where the sample is to be dropped."""
    by_reward: Mapping[str, tuple[float, np.ndarray]] = field(default_factory=dict)
    """Reward title -> (weight, (B,) float32 scores) where advantages are taken of each reward by
    itself (``combine: normalised``); empty where they are taken of the total."""
    trajectory: Trajectory | None = None
    media_BFCHW: np.ndarray | None = None
    """(B, F, 3, H, W) uint8, where asked for."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Phase ("rollout", "reward") -> seconds of work; "reward/TITLE" -> those of one reward."""

    @property
    def kept_B(self) -> np.ndarray:
        """(B,) bool: samples that take part in learning."""
        return np.isfinite(self.total_B)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Trainable weights with the number of updates that made them, and which of the kept sets they
    are."""

    version: int
    kind: str
    """"current", "average" (EMA) or "base" (before any update); of a reward its title."""
    tensors: Mapping[str, torch.Tensor]

    @property
    def tag(self) -> tuple[str, int]:
        """Equal tags mean equal weights within a run."""
        return (self.kind, self.version)


def prompts_of(units: Iterable[Unit]) -> list[str]:
    """The prompt of every sample, in unit order."""
    return [prompt for unit in units for prompt in unit.prompts]


def prompt_ids_of(units: Iterable[Unit]) -> list[int]:
    """The prompt's id of every sample, in unit order."""
    return [number for unit in units for number in unit.prompt_ids]


def with_prompts(unit: Unit, prompts: Sequence[str]) -> Unit:
    """The same unit with other words (same noise)."""
    return replace(unit, prompts=tuple(prompts))
