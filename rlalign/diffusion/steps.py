"""Step rules: one denoising step as a Gaussian over the next latent.

A rule is ``(x, clean, noise, path, level, level_next, eta) -> Gaussian``; levels are scalars or (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlalign.diffusion.paths import NoisePath, coefficients

LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """An isotropic Gaussian per sample. ``std == 0`` is a deterministic step: no density, log-prob 0 by convention, masked."""

    mean: torch.Tensor
    """(B, ...)"""
    std: torch.Tensor
    """Scalar, or (B, 1, ...) broadcastable to ``mean``; >= 0."""

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """mean + std * noise."""
        return self.mean + self.std * noise

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """(B,) float32 (float64 for float64 input): log density averaged over elements, in nats per element."""
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        mean, std, x = self.mean.to(wide), self.std.to(wide), x.to(wide)
        safe = torch.where(std > 0, std, torch.ones_like(std))
        per_element = -0.5 * ((x - mean) / safe) ** 2 - torch.log(safe) - 0.5 * LOG_2PI
        return torch.where(std > 0, per_element, torch.zeros_like(per_element)).flatten(1).mean(1)

    def kl(self, other: Gaussian) -> torch.Tensor:
        """(B,) KL(self || other) averaged over elements, nats per element; multiply by the element count for the joint one.

        Where either is deterministic it is infinite, or 0 when both are and their means agree; no gradient there.
        """
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        std, std_other = self.std.to(wide), other.std.to(wide)
        gap = (self.mean.to(wide) - other.mean.to(wide)) ** 2
        dense = (std > 0) & (std_other > 0)
        safe = torch.where(dense, std, torch.ones_like(std))
        safe_other = torch.where(dense, std_other, torch.ones_like(std_other))
        value = torch.log(safe_other / safe) + (safe**2 + gap) / (2.0 * safe_other**2) - 0.5
        same = (std == 0) & (std_other == 0) & (gap == 0)
        edge = torch.where(same, torch.zeros_like(gap), torch.full_like(gap, math.inf))
        return torch.where(dense, value, edge).flatten(1).mean(1)


StepRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, NoisePath, torch.Tensor, torch.Tensor, float], Gaussian]


def ddim(
    x: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    path: NoisePath,
    level: torch.Tensor,
    level_next: torch.Tensor,
    eta: float,
) -> Gaussian:
    """DDIM with noise eta (Song 2020, arXiv:2010.02502, eq. 12 and 16), written for any path alpha, sigma.

    variance = eta^2 * sigma_next^2 / sigma^2 * (sigma^2 - (alpha / alpha_next)^2 * sigma_next^2). eta = 1 is the DDPM
    posterior; eta = 0 is the probability-flow ODE, on the flow path exactly its Euler step.
    """
    alpha, sigma = path.alpha(level), path.sigma(level)
    alpha_next, sigma_next = path.alpha(level_next), path.sigma(level_next)
    spread = (sigma**2 - (alpha / alpha_next * sigma_next) ** 2).clamp(min=0.0)
    variance = eta**2 * (sigma_next / sigma) ** 2 * spread
    direction = (sigma_next**2 - variance).clamp(min=0.0).sqrt()
    return Gaussian(
        mean=_like(alpha_next, x) * clean + _like(direction, x) * noise,
        std=_like(variance.sqrt(), x),
    )


def ddpm(
    x: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    path: NoisePath,
    level: torch.Tensor,
    level_next: torch.Tensor,
    eta: float,
) -> Gaussian:
    """The posterior q(x_next | x, clean) (Ho 2020, arXiv:2006.11239, eq. 6-7), on the grid's own betas; std scaled by eta."""
    alpha, sigma = path.alpha(level), path.sigma(level)
    alpha_next, sigma_next = path.alpha(level_next), path.sigma(level_next)
    keep = alpha / alpha_next
    spread = (sigma**2 - (keep * sigma_next) ** 2).clamp(min=0.0)
    mean = _like(alpha_next * spread / sigma**2, x) * clean + _like(keep * (sigma_next / sigma) ** 2, x) * x
    return Gaussian(mean=mean, std=_like(eta * (sigma_next / sigma) * spread.sqrt(), x))


def flow_ode(
    x: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    path: NoisePath,
    level: torch.Tensor,
    level_next: torch.Tensor,
    eta: float,
) -> Gaussian:
    """Euler's step of the flow ODE, x + (level_next - level) * (noise - clean) (Esser 2024); eta is ignored."""
    gap = level_next - level
    return Gaussian(mean=x + _like(gap, x) * (noise - clean), std=_like(torch.zeros_like(gap), x))


def flow_sde(
    x: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    path: NoisePath,
    level: torch.Tensor,
    level_next: torch.Tensor,
    eta: float,
) -> Gaussian:
    """Flow-GRPO's marginal-preserving SDE (Liu 2025, arXiv:2505.05470, eq. 8-9), g = eta * sqrt(s / (1 - s)).

    At s = 1, where g is infinite, the next grid value stands in for s in g's denominator, as in the authors' code.
    """
    gap = level_next - level
    g2 = eta**2 * level / (1.0 - torch.where(level >= 1.0, level_next, level))
    half = g2 / (2.0 * level)
    velocity = noise - clean
    mean = x * _like(1.0 + half * gap, x) + velocity * _like((1.0 + half * (1.0 - level)) * gap, x)
    return Gaussian(mean=mean, std=_like((g2 * -gap).clamp(min=0.0).sqrt(), x))


def flow_dance(
    x: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    path: NoisePath,
    level: torch.Tensor,
    level_next: torch.Tensor,
    eta: float,
) -> Gaussian:
    """DanceGRPO's SDE (Xue 2025, arXiv:2505.07818): a constant g = eta with the score's correction, -sigma^-1 times the noise.

    On fine grids the correction blows up near the data, where sigma goes to 0.
    """
    gap = level_next - level
    mean = x + _like(gap, x) * (noise - clean) + _like(0.5 * eta**2 * gap / level, x) * noise
    return Gaussian(mean=mean, std=_like(eta * (-gap).clamp(min=0.0).sqrt(), x))


def flow_cps(
    x: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    path: NoisePath,
    level: torch.Tensor,
    level_next: torch.Tensor,
    eta: float,
) -> Gaussian:
    """Coefficients-preserving sampling (Wang 2025, arXiv:2509.05952): the noise is always the level's own, eta in [0, 1].

    std = s' sin(eta pi / 2), the rest of the level is the predicted noise: sharp in few steps, but it does not tend to the
    data's variance as the grid gets finer. The log-prob here is the Gaussian's own; the paper's leaves out 1 / (2 std^2).
    """
    std = level_next * math.sin(eta * math.pi / 2.0)
    kept = (level_next**2 - std**2).clamp(min=0.0).sqrt()
    return Gaussian(mean=_like(1.0 - level_next, x) * clean + _like(kept, x) * noise, std=_like(std, x))


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
) -> Gaussian:
    """One step under a named rule."""
    return RULES[rule](x, clean, noise, path, level, level_next, eta)


def is_stochastic(path: NoisePath, levels: torch.Tensor, *, rule: str, eta: float) -> torch.Tensor:
    """(K,) bool: which steps of a grid have a density."""
    probe = torch.zeros(1, 1, dtype=torch.float64)
    stds = [RULES[rule](probe, probe, probe, path, levels[k], levels[k + 1], eta).std for k in range(len(levels) - 1)]
    return torch.stack([s.reshape(()) > 0 for s in stds])


def _like(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return value.to(x).reshape((-1, *([1] * (x.ndim - 1))) if value.ndim else ())


__all__ = [
    "RULES",
    "Gaussian",
    "StepRule",
    "coefficients",
    "ddim",
    "ddpm",
    "flow_cps",
    "flow_dance",
    "flow_ode",
    "flow_sde",
    "is_stochastic",
    "step",
]
