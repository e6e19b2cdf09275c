"""Noise paths: x = alpha * clean + sigma * noise, on a grid of levels from noise to data.

Levels, alphas and sigmas are float64 and cast to the latents' type where they meet them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError


class NoisePath(Protocol):
    """A Gaussian path between data and noise."""

    @property
    def train_steps(self) -> int:
        """T: the timesteps that the denoiser was trained with."""
        ...

    @property
    def level_gap(self) -> float:
        """Distance of two neighbouring training levels."""
        ...

    @property
    def variance_type(self) -> str:
        """Whose variance a step of the rule ``ddpm`` has, in the words of diffusers'
        DDPMScheduler."""
        ...

    def at(self, plan: Plan) -> NoisePath:
        """The path at a plan's resolution and number of steps: the one whose ``levels`` and
        ``random_levels`` may be asked for."""
        ...

    def levels(self, steps: int) -> torch.Tensor:
        """(steps + 1,) float64, noisiest first; the last one is where sampling ends."""
        ...

    def alpha(self, level: torch.Tensor) -> torch.Tensor:
        """Factor of the clean sample at each level."""
        ...

    def sigma(self, level: torch.Tensor) -> torch.Tensor:
        """Factor of the noise at each level."""
        ...

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        """What the denoiser is told: the number it was trained with."""
        ...

    def random_levels(self, uniform_B: np.ndarray) -> torch.Tensor:
        """(B,) float64 levels as in training from numbers in [0, 1): uniform over timesteps, or
        over the flow's time."""
        ...


class VariancePreserving:
    """alpha^2 + sigma^2 = 1 from a table of cumulative alphas (Ho 2020, arXiv:2006.11239, eq. 4).

    A level is a training timestep in [0, T); -1 stands for the clean sample itself. ``spacing`` and
    ``offset`` choose the sub-sampled grid as diffusers does (Lin 2023, arXiv:2305.08891, table 2);
    ``beyond`` is 1 where the K timesteps of "linspace" are the first of K + 1, as in DPM-Solver.
    ``ends_clean`` False ends at timestep 0, whose sigma is small but not zero, which is Stable
    Diffusion's ``set_alpha_to_one=False``. ``variance_type`` is DDPMScheduler's, for the rule
    ``ddpm`` alone.
    """

    def __init__(
        self,
        alphas_cumprod: Sequence[float] | torch.Tensor,
        *,
        spacing: str = "leading",
        offset: int = 1,
        beyond: int = 0,
        ends_clean: bool = False,
        variance_type: str = "fixed_small",
    ) -> None:
        assert spacing in ("leading", "trailing", "linspace"), spacing
        self.alphas_cumprod = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        self.spacing, self.offset, self.ends_clean = spacing, offset, ends_clean
        self.beyond = beyond
        self.variance_type = variance_type

    @classmethod
    def scaled_linear(
        cls, start: float = 0.00085, end: float = 0.012, train_steps: int = 1000, **grid: object
    ) -> VariancePreserving:
        """Stable Diffusion's schedule: betas whose square roots are evenly spaced (float32, as
        diffusers computes them)."""
        betas = torch.linspace(start**0.5, end**0.5, train_steps, dtype=torch.float32) ** 2
        return cls(torch.cumprod(1.0 - betas, dim=0), **grid)  # type: ignore[arg-type]

    @property
    def train_steps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def level_gap(self) -> float:
        return 1.0

    def at(self, plan: Plan) -> VariancePreserving:
        return self

    def levels(self, steps: int) -> torch.Tensor:
        # a grid cannot have more steps than the model has timesteps
        total = self.train_steps
        if steps > total:
            raise UserError(
                f"plan.steps must be <= {total}, the timesteps the model was trained with, got"
                f" {steps}"
            )

        # the grids of diffusers, from the noisiest timestep on
        if self.spacing == "leading":
            grid = (np.arange(steps) * (total // steps)).round()[::-1] + self.offset
        elif self.spacing == "trailing":
            # arange can run one value too far, by rounding (61 steps of 1000): the cut keeps the
            # grid as long as was asked
            grid = (np.round(np.arange(total, 0, -total / steps)) - 1)[:steps]
        else:
            grid = np.linspace(0, total - 1, steps + self.beyond).round()[::-1][:steps]
        grid = np.minimum(grid, total - 1)
        return torch.tensor([*grid, -1.0 if self.ends_clean else 0.0], dtype=torch.float64)

    def _cumulative(self, level: torch.Tensor) -> torch.Tensor:
        index = level.to(torch.float64).round().long()
        return torch.where(
            index < 0, torch.ones((), dtype=torch.float64), self.alphas_cumprod[index.clamp(min=0)]
        )

    def alpha(self, level: torch.Tensor) -> torch.Tensor:
        return self._cumulative(level).sqrt()

    def sigma(self, level: torch.Tensor) -> torch.Tensor:
        return (1.0 - self._cumulative(level)).sqrt()

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        return level.round().long()

    def random_levels(self, uniform_B: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(
            np.floor(np.asarray(uniform_B, dtype=np.float64) * self.train_steps)
        )


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """How many tokens a flow's transformer sees of a plan's picture or clip."""

    side: int
    """Pixels of a token's side."""
    frames: int = 1
    """Frames of a token, after a clip's first."""
    height: int = 0
    width: int = 0
    """Pixels where the plan leaves them to the policy."""

    def count(self, plan: Plan) -> int:
        """n of one sample."""
        height = (plan.height or self.height) // self.side
        width = (plan.width or self.width) // self.side
        return height * width * ((plan.frames - 1) // self.frames + 1)


@dataclass(frozen=True, kw_only=True)
class LineShift:
    """A shift that grows with the resolution, as FlowMatchEuler's dynamic one: mu on a line through
    two numbers of tokens, which goes on beyond them."""

    tokens: Tokens
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    exponential: bool = True
    """Whether the shift is exp(mu), or mu itself."""

    def shift(self, plan: Plan) -> float:
        """The factor a of a plan."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.tokens.count(plan) * slope + (self.base_shift - slope * self.base_tokens)
        return math.exp(mu) if self.exponential else mu


@dataclass(frozen=True, kw_only=True)
class StepsShift:
    """FLUX.2's shift, which its pipeline fitted to tokens and steps (``compute_empirical_mu``)."""

    tokens: Tokens
    exponential: bool = True
    """Whether the shift is exp(mu), or mu itself."""

    def shift(self, plan: Plan) -> float:
        """The factor a of a plan."""
        n = self.tokens.count(plan)
        at_200 = 0.00016927 * n + 0.45666666
        mu = at_200
        if n <= 4300:
            at_10 = 8.73809524e-05 * n + 1.89833333
            slope = (at_200 - at_10) / 190.0
            mu = slope * plan.steps + (at_200 - 200.0 * slope)
        return math.exp(mu) if self.exponential else mu


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """x = (1 - s) * clean + s * noise with level s in [0, 1] (Liu 2022, arXiv:2209.03003; Esser
    2024, arXiv:2403.03206).

    K evenly spaced levels are moved towards noise, s -> a s / (a s + 1 - s), and stretched so that
    the last one is ``terminal`` where that is set; level 0 follows. a is ``shift``, or what
    ``moving`` makes of a plan (``at``). The denoiser is told ``train_steps * s``.
    """

    shift: float = 1.0
    train_steps: int = 1000
    first: float = 1.0
    """Where the even levels begin."""
    last: float | None = None
    """Where they end; None is the lowest trained level, 1/T, already shifted: FlowMatchEuler shifts
    it once before it lays the grid, and once more with the grid."""
    beyond: int = 0
    """1 where they are the first K of K + 1."""
    terminal: float = 0.0
    """Level of the last step (diffusers' ``shift_terminal``); 0 is wherever the shift leaves it."""
    moving: LineShift | StepsShift | None = None

    def __post_init__(self) -> None:
        assert self.shift > 0 and 0.0 <= self.terminal < 1.0

    @property
    def level_gap(self) -> float:
        return 1.0 / self.train_steps

    @property
    def variance_type(self) -> str:
        return "fixed_small"

    def at(self, plan: Plan) -> RectifiedFlow:
        if self.moving is None:
            return self
        return replace(self, shift=self.moving.shift(plan), moving=None)

    def shifted(self, level: torch.Tensor) -> torch.Tensor:
        """The level after the shift."""
        assert self.moving is None, "this path's levels depend on the plan: ask path.at(plan)"
        # in this form exactly 1 at level 1, for any shift: there the SDE rule must see its singular
        # point
        return self.shift * level / (self.shift * level + (1.0 - level))

    def levels(self, steps: int) -> torch.Tensor:
        last = self.last
        if last is None:
            last = float(self.shifted(torch.tensor(1.0 / self.train_steps, dtype=torch.float64)))
        grid = torch.linspace(self.first, last, steps + self.beyond, dtype=torch.float64)[:steps]
        level_K = self.shifted(grid)
        # of one level there is nothing to stretch: it is the noise
        if self.terminal and steps > 1:
            level_K = 1.0 - (1.0 - level_K) * ((1.0 - self.terminal) / (1.0 - level_K[-1]))
        return torch.cat([level_K, torch.zeros(1, dtype=torch.float64)])

    def alpha(self, level: torch.Tensor) -> torch.Tensor:
        return 1.0 - level.to(torch.float64)

    def sigma(self, level: torch.Tensor) -> torch.Tensor:
        return level.to(torch.float64)

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        return level * self.train_steps

    def random_levels(self, uniform_B: np.ndarray) -> torch.Tensor:
        # 0 would ask for the noise in a clean picture; sampling never does
        return self.shifted(
            torch.from_numpy(np.maximum(np.asarray(uniform_B, dtype=np.float64), 1e-3))
        )


def elbo_weight(path: NoisePath, level_B: torch.Tensor, prediction: str) -> torch.Tensor:
    """(B,) float64 weight of |target - prediction|^2 (mean over elements) in the variational bound,
    nats per element.

    Half the drop of the signal-to-noise ratio alpha^2 / sigma^2 over one training step times the
    squared error of the clean prediction (Kingma 2021, arXiv:2107.00630, eq. 13), brought to the
    network's own prediction type. For epsilon it is beta_t^2 / (2 std^2 alpha_t (1 - alpha_bar_t))
    of Ho 2020, eq. 12, with the posterior's std. The last training step, whose ratio has no bound,
    takes the weight of the one before it.
    """
    level_B = level_B.to(torch.float64).clamp(
        min=2.0 * path.level_gap if prediction == "flow" else path.level_gap
    )
    before_B = level_B - path.level_gap
    alpha = path.alpha(level_B)
    sigma = path.sigma(level_B)
    drop = (path.alpha(before_B) / path.sigma(before_B)) ** 2 - (alpha / sigma) ** 2
    to_clean = {
        "epsilon": (sigma / alpha) ** 2,
        "v_prediction": sigma**2,
        "sample": torch.ones_like(sigma),
        "flow": sigma**2,
    }
    return 0.5 * drop * to_clean[prediction]


def coefficients(
    path: NoisePath, level: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma of ``level`` (scalar or (B,)), in the type of ``like`` (B, ...), shaped to
    multiply it."""
    shape = (-1, *([1] * (like.ndim - 1))) if level.ndim else ()
    alpha = path.alpha(level)
    sigma = path.sigma(level)
    return alpha.to(like).reshape(shape), sigma.to(like).reshape(shape)
