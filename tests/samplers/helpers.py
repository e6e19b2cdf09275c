"""What tests of samplers share: a policy whose data are Gaussian, so that everything it sees is
known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlalign.core.records import Plan, Space, Unit, UnitKey
from rlalign.diffusion.paths import NoisePath, RectifiedFlow, VariancePreserving
from rlalign.engine import Rewards, Scores
from rlalign.policies.base import OWN_SIZE, Condition, Family, Policy, Words
from rlalign.sampling import LocalEngine

Reward = Callable[[torch.Tensor], torch.Tensor]
"""(B, D) float64 clean samples -> (B,) rewards."""


def linear_path(steps: int = 1000) -> VariancePreserving:
    """Betas from 1e-4 to 0.02, evenly respaced, ending in the clean sample."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return VariancePreserving(
        torch.cumprod(1.0 - betas, dim=0), spacing="linspace", ends_clean=True
    )


class GaussianFamily(Family):
    """Data N(mean, variance) in D independent numbers, in float64; media are the numbers
    themselves.

    E[noise | x] and E[clean | x] at x = alpha * clean + sigma * noise are exact on either path.
    """

    def __init__(
        self, path: NoisePath, *, size: int = 1, mean: float = 0.0, variance: float = 1.0
    ) -> None:
        self.path, self.device, self.size, self.mean, self.variance = (
            path,
            "cpu",
            size,
            mean,
            variance,
        )
        self.prediction = "flow" if isinstance(path, RectifiedFlow) else "epsilon"
        self.network = torch.nn.Linear(1, 1).double()

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        rows = torch.zeros(len(prompts), 1, 1, dtype=torch.float64)
        words = Words({"embeds_BLD": rows})
        return Condition(caption=words, empty=words)

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        level = timestep_B.double() / (1000.0 if self.prediction == "flow" else 1.0)
        alpha, sigma = (
            v.reshape(-1, *([1] * (x.ndim - 1)))
            for v in (self.path.alpha(level), self.path.sigma(level))
        )
        spread = alpha**2 * self.variance + sigma**2
        noise = sigma * (x - alpha * self.mean) / spread
        clean = self.mean + alpha * self.variance * (x - alpha * self.mean) / spread
        return noise - clean if self.prediction == "flow" else noise

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, None]

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        return media_BFCHW[:, 0]

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        return (self.size, 1, 1)

    def save(self, folder: Path) -> None:
        raise NotImplementedError


class GaussianPolicy(Policy):
    """The policy of a Gaussian family with these settings."""

    def __init__(self, path: NoisePath, **settings: Any) -> None:
        super().__init__(GaussianFamily(path, **settings))


class ExactRewards:
    """A function of the samples as they are, decoded or not, without rounding to bytes."""

    def __init__(self, reward: Reward, space: Space = "media") -> None:
        self._reward, self._space = reward, space
        self.queries = self.gradients = self.missing = 0

    def spaces(self, *, held_out: bool = False) -> frozenset[Space]:
        return frozenset({self._space})

    def scores(
        self,
        samples: Mapping[Space, torch.Tensor],
        prompts: Sequence[str],
        *,
        held_out: bool = False,
    ) -> Scores:
        value_B = self._reward(samples[self._space].flatten(1).double()).detach().numpy()
        self.queries += len(prompts)
        self.missing += int((~np.isfinite(value_B)).sum())
        return Scores({"reward": value_B}, value_B)

    def gradient(
        self, samples: Mapping[Space, torch.Tensor], prompts: Sequence[str]
    ) -> tuple[np.ndarray, dict[Space, torch.Tensor]]:
        with torch.enable_grad():
            given = samples[self._space].detach().requires_grad_()
            value_B = self._reward(given.flatten(1).double())
            (gradient,) = torch.autograd.grad(value_B.sum(), given)
        self.queries += len(prompts)
        self.gradients += len(prompts)
        known_B = torch.isfinite(value_B.detach()).reshape(-1, *([1] * (gradient.ndim - 1)))
        return value_B.detach().numpy(), {self._space: torch.where(known_B, gradient, 0.0)}


def engine_of(policy: Policy, reward: Reward | Rewards, *, rows: int = 1 << 20) -> LocalEngine:
    """One thread, one piece for all rows."""
    rewards: Rewards = reward if hasattr(reward, "scores") else ExactRewards(reward)  # type: ignore[assignment]
    return LocalEngine(policy, [rewards], rows=rows, parallel=False)


def unit_of(count: int, plan: Plan, *, seed: int = 0) -> Unit:
    """``count`` rows with noise of their own."""
    return Unit(
        key=UnitKey("sample", 0, 0),
        prompts=("a red circle",) * count,
        prompt_ids=(7,) * count,
        sample_ids=tuple(range(count)),
        seed=seed,
        plan=plan,
    )


def chain_variance(path: NoisePath, plan: Plan, variance: float = 1.0) -> float:
    """Variance of what the plan's chain ends in, from N(0, 1), by its linear recursion; ddim's
    coefficients."""
    from rlalign.diffusion.steps import step

    levels, now = path.levels(plan.steps), 1.0
    for k in range(plan.steps):
        x = torch.ones(1, 1, dtype=torch.float64)
        alpha, sigma = float(path.alpha(levels[k])), float(path.sigma(levels[k]))
        spread = alpha**2 * variance + sigma**2
        clean, noise = alpha * variance / spread * x, sigma / spread * x
        gaussian = step(
            x, clean, noise, path, levels[k], levels[k + 1], rule=plan.rule, eta=plan.eta
        )
        now = float(gaussian.mean) ** 2 * now + float(gaussian.std) ** 2
    return now


def quadratic(a: float, b2: float) -> Reward:
    """-(x - a)^2 / (2 b2)."""
    return lambda x_BD: -((x_BD[:, 0] - a) ** 2) / (2.0 * b2)


def tilted(variance: float, a: float, b2: float) -> tuple[float, float, float]:
    """(mean, variance, log Z) of N(0, variance) tilted by exp(quadratic(a, b2))."""
    precision = 1.0 / variance + 1.0 / b2
    mean = (a / b2) / precision
    log_z = 0.5 * np.log(1.0 / precision / variance) - a * a / (2.0 * (variance + b2))
    return mean, 1.0 / precision, float(log_z)
