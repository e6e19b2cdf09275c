"""Step rules: one denoising step as a Gaussian over the next latent.

A rule is a function of one ``Move``: where the chain is, what the policy saw there, and where to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.diffusion.paths import NoisePath, coefficients

SMALL_VARIANCE = ("fixed_small", "fixed_small_log")
LARGE_VARIANCE = "fixed_large"
"""The variance types of diffusers' DDPMScheduler that a step of the rule ``ddpm`` can have."""
LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """An isotropic Gaussian per sample. ``std == 0`` is a deterministic step: no density, log-prob
    0 by convention, masked."""

    mean: torch.Tensor
    """(B, ...)"""
    std: torch.Tensor
    """Scalar, or (B, 1, ...) broadcastable to ``mean``; >= 0."""

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """mean + std * noise."""
        return self.mean + self.std * noise

    def take(self, rows: torch.Tensor) -> Gaussian:
        """The Gaussians of these rows, of one std for all."""
        return Gaussian(mean=self.mean[rows], std=self.std)

    def to_cpu(self) -> Gaussian:
        """The same on the CPU, without a graph."""
        return Gaussian(mean=self.mean.detach().cpu(), std=self.std.detach().cpu())

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """(B,) float32 (float64 for float64 input): log density averaged over elements, in nats per
        element."""
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        mean = self.mean.to(wide)
        std = self.std.to(wide)
        x = x.to(wide)
        safe = torch.where(std > 0, std, torch.ones_like(std))
        per_element = -0.5 * ((x - mean) / safe) ** 2 - torch.log(safe) - 0.5 * LOG_2PI
        return torch.where(std > 0, per_element, torch.zeros_like(per_element)).flatten(1).mean(1)

    def kl(self, other: Gaussian) -> torch.Tensor:
        """(B,) KL(self || other) averaged over elements, nats per element; multiply by the element
        count for the joint one.

        Where either is deterministic it is infinite, or 0 when both are and their means agree; no
        gradient there.
        """
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        std = self.std.to(wide)
        std_other = other.std.to(wide)
        gap = (self.mean.to(wide) - other.mean.to(wide)) ** 2
        dense = (std > 0) & (std_other > 0)
        safe = torch.where(dense, std, torch.ones_like(std))
        safe_other = torch.where(dense, std_other, torch.ones_like(std_other))
        value = torch.log(safe_other / safe) + (safe**2 + gap) / (2.0 * safe_other**2) - 0.5
        same = (std == 0) & (std_other == 0) & (gap == 0)
        edge = torch.where(same, torch.zeros_like(gap), torch.full_like(gap, math.inf))
        return torch.where(dense, value, edge).flatten(1).mean(1)


class Move(NamedTuple):
    """One step of a chain: where it is, what the policy saw there, and where it goes."""

    x: torch.Tensor
    """(B, ...) the latent."""
    clean: torch.Tensor
    noise: torch.Tensor
    path: NoisePath
    level: torch.Tensor
    """Scalar or (B,)."""
    level_next: torch.Tensor
    eta: float


StepRule = Callable[[Move], Gaussian]


def ddim(move: Move) -> Gaussian:
    """DDIM with noise eta (Song 2020, arXiv:2010.02502, eq. 12 and 16), written for any path alpha,
    sigma.

    variance = eta^2 * sigma_next^2 / sigma^2 * (sigma^2 - (alpha / alpha_next)^2 * sigma_next^2).
    eta = 1 is the DDPM posterior; eta = 0 is the probability-flow ODE, on the flow path exactly its
    Euler step.
    """
    x, clean, noise, path, level, level_next, eta = move
    alpha = path.alpha(level)
    sigma = path.sigma(level)
    alpha_next = path.alpha(level_next)
    sigma_next = path.sigma(level_next)
    spread = (sigma**2 - (alpha / alpha_next * sigma_next) ** 2).clamp(min=0.0)
    variance = eta**2 * (sigma_next / sigma) ** 2 * spread
    direction = (sigma_next**2 - variance).clamp(min=0.0).sqrt()
    return Gaussian(
        mean=_like(alpha_next, x) * clean + _like(direction, x) * noise,
        std=_like(variance.sqrt(), x),
    )


def ddpm(move: Move) -> Gaussian:
    """The posterior q(x_next | x, clean) (Ho 2020, arXiv:2006.11239, eq. 6-7), on the grid's own
    betas; std scaled by eta.

    The std is that of the path's ``variance_type``, as in diffusers' DDPMScheduler: the posterior's
    (fixed_small), or the root of the step's beta (fixed_large, but for a step from timestep 0,
    which has no noise). Raises UserError for any other.
    """
    x, clean, _, path, level, level_next, eta = move

    # the mean of the Gaussian between the two levels
    alpha = path.alpha(level)
    sigma = path.sigma(level)
    alpha_next = path.alpha(level_next)
    sigma_next = path.sigma(level_next)
    keep = alpha / alpha_next
    spread = (sigma**2 - (keep * sigma_next) ** 2).clamp(min=0.0)
    mean = (
        _like(alpha_next * spread / sigma**2, x) * clean
        + _like(keep * (sigma_next / sigma) ** 2, x) * x
    )

    # its variance, as the scheduler asks for it
    if path.variance_type in SMALL_VARIANCE:
        return Gaussian(mean=mean, std=_like(eta * (sigma_next / sigma) * spread.sqrt(), x))
    if path.variance_type != LARGE_VARIANCE:
        # the variances that a network learns are outputs of their own; of fixed_large_log diffusers
        # takes a logarithm's root
        raise UserError(
            "plan.rule ddpm needs a scheduler with the variance_type fixed_small, fixed_small_log"
            f" or fixed_large, got {path.variance_type!r}; take the rule ddim, or change it in"
            " scheduler_config.json"
        )
    return Gaussian(
        mean=mean,
        std=_like(eta * torch.where(level > 0, spread, torch.zeros_like(spread)).sqrt(), x),
    )


def flow_ode(move: Move) -> Gaussian:
    """Euler's step of the flow ODE, x + (level_next - level) * (noise - clean) (Esser 2024); eta is
    ignored."""
    x, clean, noise, _, level, level_next, _ = move
    gap = level_next - level
    return Gaussian(mean=x + _like(gap, x) * (noise - clean), std=_like(torch.zeros_like(gap), x))


def flow_sde(move: Move) -> Gaussian:
    """Flow-GRPO's marginal-preserving SDE (Liu 2025, arXiv:2505.05470, eq. 8-9), g = eta * sqrt(s /
    (1 - s)).

    At s = 1, where g is infinite, the next grid value stands in for s in g's denominator, as in the
    authors' code.
    """
    x, clean, noise, _, level, level_next, eta = move
    gap = level_next - level
    g2 = eta**2 * level / (1.0 - torch.where(level >= 1.0, level_next, level))
    half = g2 / (2.0 * level)
    velocity = noise - clean
    mean = x * _like(1.0 + half * gap, x) + velocity * _like((1.0 + half * (1.0 - level)) * gap, x)
    return Gaussian(mean=mean, std=_like((g2 * -gap).clamp(min=0.0).sqrt(), x))


def flow_dance(move: Move) -> Gaussian:
    """DanceGRPO's SDE (Xue 2025, arXiv:2505.07818): a constant g = eta with the score's correction,
    -sigma^-1 times the noise.

    On fine grids the correction blows up near the data, where sigma goes to 0.
    """
    x, clean, noise, _, level, level_next, eta = move
    gap = level_next - level
    mean = x + _like(gap, x) * (noise - clean) + _like(0.5 * eta**2 * gap / level, x) * noise
    return Gaussian(mean=mean, std=_like(eta * (-gap).clamp(min=0.0).sqrt(), x))


def flow_cps(move: Move) -> Gaussian:
    """Coefficients-preserving sampling (Wang 2025, arXiv:2509.05952): the noise is always the
    level's own, eta in [0, 1].

    std = s' sin(eta pi / 2), the rest of the level is the predicted noise: sharp in few steps, but
    it does not tend to the data's variance as the grid gets finer. The log-prob here is the
    Gaussian's own; the paper's leaves out 1 / (2 std^2).
    """
    x, clean, noise, _, _, level_next, eta = move
    std = level_next * math.sin(eta * math.pi / 2.0)
    kept = (level_next**2 - std**2).clamp(min=0.0).sqrt()
    return Gaussian(
        mean=_like(1.0 - level_next, x) * clean + _like(kept, x) * noise, std=_like(std, x)
    )


RULES: dict[str, StepRule] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "flow_ode": flow_ode,
    "flow_sde": flow_sde,
    "flow_dance": flow_dance,
    "flow_cps": flow_cps,
}


def step(
    x: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    path: NoisePath,
    level: torch.Tensor,
    level_next: torch.Tensor,
    *,
    rule: str,
    eta: float,
    min_std: float = 0.0,
) -> Gaussian:
    """One step under a named rule.

    Where eta is above 0 the std is at least ``min_std``, also in the step to the clean sample, as
    DPPO clips it (Ren 2024, arXiv:2409.00588); the mean is the rule's.
    """
    gaussian = RULES[rule](Move(x, clean, noise, path, level, level_next, eta))
    if not min_std or not eta:
        return gaussian
    return Gaussian(mean=gaussian.mean, std=gaussian.std.clamp(min=min_std))


def noise_of(plan: Plan) -> dict[str, Any]:
    """What ``step`` and ``is_stochastic`` are told of a plan."""
    return {"rule": plan.rule, "eta": plan.eta, "min_std": plan.min_std}


def is_stochastic(
    path: NoisePath, levels: torch.Tensor, *, rule: str, eta: float, min_std: float = 0.0
) -> torch.Tensor:
    """(K,) bool: which steps of a grid have a density."""
    probe = torch.zeros(1, 1, dtype=torch.float64)
    how: Any = {"rule": rule, "eta": eta, "min_std": min_std}
    stds = [
        step(probe, probe, probe, path, level, level_next, **how).std
        for level, level_next in pairwise(levels)
    ]
    return torch.stack([s.reshape(()) > 0 for s in stds])


def _like(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return value.to(x).reshape((-1, *([1] * (x.ndim - 1))) if value.ndim else ())


__all__ = [
    "RULES",
    "Gaussian",
    "Move",
    "StepRule",
    "coefficients",
    "ddim",
    "ddpm",
    "flow_cps",
    "flow_dance",
    "flow_ode",
    "flow_sde",
    "is_stochastic",
    "noise_of",
    "step",
]
