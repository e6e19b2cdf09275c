"""The records that travel between rooms: frozen, keyword-only, the shape in each field's docstring.

Letters: B samples, K denoising steps, F frames, C H W, P prompts, G samples per prompt, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

StepRuleName = Literal["ddim", "ddpm", "flow_ode", "flow_sde"]


class Plan(BaseModel):
    """How a trajectory is made. It travels inside the trajectory, so replay cannot use other numbers than the rollout did."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=10, ge=1, le=1000, description="denoising steps K")
    rule: StepRuleName = Field(default="ddim", description="step rule: ddim, ddpm, flow_ode or flow_sde")
    eta: float = Field(
        default=1.0, ge=0.0, allow_inf_nan=False, description="noise: 0 is the ODE, 1 the DDPM posterior (ddim)"
    )
    guidance: float = Field(
        default=1.0, ge=0.0, allow_inf_nan=False, description="classifier-free guidance scale; 1 is none"
    )
    height: int = Field(default=0, ge=0, description="pixels; 0 is the policy's own size")
    width: int = Field(default=0, ge=0, description="pixels; 0 is the policy's own size")
    frames: int = Field(default=1, ge=1, description="1 is a picture")


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


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One unit, denoised. Arrays are numpy and may be read-only views of shared memory: clone before writing."""

    unit: Unit
    policy_version: int
    latents_BK1: np.ndarray
    """(B, K+1, C, H, W) float32 or float16: x_T first, the final latent last, as stored before its log-prob was taken."""
    log_prob_BK: np.ndarray
    """(B, K) float32, nats per latent element (mean over elements); 0 where the step is deterministic."""
    stochastic_K: np.ndarray
    """(K,) bool: False where a step has no density."""

    def __post_init__(self) -> None:
        # float16 near |log p| = 1.4 has a spacing of 9.8e-4: coarser than any published clip range
        assert self.log_prob_BK.dtype == np.float32, f"log_prob must be float32, got {self.log_prob_BK.dtype}"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A unit with its scores: the small facts, and the trajectory where this process needs it."""

    unit: Unit
    policy_version: int
    raw: Mapping[str, np.ndarray]
    """Reward title -> (B,) float32 raw scores; NaN where the sample is to be dropped."""
    total_B: np.ndarray
    """(B,) float32 weighted sum; NaN where the sample is to be dropped."""
    trajectory: Trajectory | None = None
    media_BFCHW: np.ndarray | None = None
    """(B, F, 3, H, W) uint8, where asked for."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Phase ("rollout", "reward") -> seconds of work."""

    @property
    def kept_B(self) -> np.ndarray:
        """(B,) bool: samples that take part in learning."""
        return np.isfinite(self.total_B)


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Denoising steps with advantages: what policy-gradient algorithms eat. Whole units, so that a replay can use the
    rollout's own batch shape."""

    units: tuple[Unit, ...]
    latents: tuple[torch.Tensor, ...]
    """Per unit (B, K+1, C, H, W) float32."""
    log_prob: tuple[torch.Tensor, ...]
    """Per unit (B, K) float32 behaviour log-probs, nats per element."""
    stochastic: tuple[torch.Tensor, ...]
    """Per unit (K,) bool."""
    advantage: tuple[torch.Tensor, ...]
    """Per unit (B,) float32; 0 for a dropped sample."""

    def __len__(self) -> int:
        return sum(len(u.prompts) for u in self.units)

    def pick(self, indices: Sequence[int]) -> StepBatch:
        """The batch of these units, in this order."""
        return StepBatch(
            units=tuple(self.units[i] for i in indices),
            latents=tuple(self.latents[i] for i in indices),
            log_prob=tuple(self.log_prob[i] for i in indices),
            stochastic=tuple(self.stochastic[i] for i in indices),
            advantage=tuple(self.advantage[i] for i in indices),
        )

    def passes(self, steps_per_pass: int) -> Iterator[StepPass]:
        """Slices of one unit and up to ``steps_per_pass`` of its stochastic steps; their weights sum to 1 over the batch.

        A weight is the slice's share of all stochastic (sample, step) pairs, so the weighted sum of slice means is the
        mean over pairs, whatever the slicing.
        """
        pairs = sum(len(u.prompts) * int(s.sum()) for u, s in zip(self.units, self.stochastic, strict=True))
        for i, unit in enumerate(self.units):
            steps = torch.nonzero(self.stochastic[i]).flatten().tolist()
            for start in range(0, len(steps), steps_per_pass):
                chosen = tuple(steps[start : start + steps_per_pass])
                yield StepPass(
                    unit=unit,
                    steps=chosen,
                    latents_BK1=self.latents[i],
                    log_prob_BS=self.log_prob[i][:, list(chosen)],
                    advantage_B=self.advantage[i],
                    weight=len(unit.prompts) * len(chosen) / pairs,
                )


@dataclass(frozen=True, kw_only=True)
class StepPass:
    """One forward pass of a StepBatch: the steps ``steps`` of one unit."""

    unit: Unit
    steps: tuple[int, ...]
    latents_BK1: torch.Tensor
    log_prob_BS: torch.Tensor
    advantage_B: torch.Tensor
    weight: float


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Clean latents with weights: what reward-weighted regression eats."""

    prompts: tuple[str, ...]
    latents_BCHW: torch.Tensor
    weight_B: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Preferred and rejected clean latents of one prompt each: what preference algorithms eat."""

    prompts: tuple[str, ...]
    winner_BCHW: torch.Tensor
    loser_BCHW: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts alone: what reward backpropagation eats."""

    units: tuple[Unit, ...]


Batch = StepBatch | ImageBatch | PairBatch | PromptBatch


def with_prompts(unit: Unit, prompts: Sequence[str]) -> Unit:
    """The same unit with other words (same noise)."""
    return replace(unit, prompts=tuple(prompts))
