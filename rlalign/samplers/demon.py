"""Sampling Demon: a step's noise is put together from candidates, weighted by the reward that each
leads to."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Plan, Unit
from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.paths import coefficients
from rlalign.diffusion.rollout import schedule_of
from rlalign.engine import Engine, View, expand, look_rows, score_rows
from rlalign.engine.particles import normalise
from rlalign.samplers.base import NonNegative, Result, Sampler, group_rows, refuse_unscored


class Demon(Sampler):
    """Each step's noise is put together from K candidates, weighted by the reward that they lead
    to.

    Noises z_k lead to rewards R_k; the step is taken with sum w_k z_k, brought back to the norm
    sqrt(dimensions). w = tanh((R - mean) / tau), softmax(R / tau), or R - mean. tau is the standard
    deviation of the R_k at every step; a number fixes it, and "first" freezes it at the first
    step's, as the published code does. Equal rewards keep the plain noise. ``beta`` 0 takes the
    plan's own steps; above 0 it is the paper's SDE with Heun steps, on any path (sigma / alpha is
    its noise level).

    Source: Yeh 2024, arXiv:2410.05760 (Tanh and Boltzmann Demon, algorithm 1; the SDE: equation 3).
    """

    needs_noise: ClassVar[bool] = True
    width: ClassVar[str] = "candidates"

    candidates: int = Field(default=8, ge=1, description="K, noises tried at each step")
    weights: Literal["tanh", "boltzmann", "linear"] = Field(
        default="tanh", description="how rewards become weights"
    )
    temperature: Literal["adaptive", "first"] | float = Field(
        default="adaptive", description="tau, or how it is found"
    )
    look_ahead: int = Field(
        default=1,
        ge=1,
        description="steps without noise to the picture that is scored; 1 is one look",
    )
    stop: float = Field(
        default=0.0, ge=0, description="noise level sigma / alpha below which steps have no noise"
    )
    beta: NonNegative = Field(
        default=0.0, description="noise of the paper's SDE; 0 is the plan's steps"
    )

    def sample(self, engine: Engine, unit: Unit) -> Result:
        steps = unit.plan.steps
        frozen = None
        x = engine.begin(unit)
        noisy_K = self._noisy_steps(engine, unit)
        gains = []
        kernel = _Heun(self.beta) if self.beta else _Planned()
        # every step: look, draw candidates, score where they lead, mix their noise
        for k in range(steps):
            if not noisy_K[k]:
                x = kernel.quiet(engine, unit, x, k)
                continue
            seen = look_rows(engine, unit, x, k)
            rows = expand(unit, self.candidates)
            z_M = unit_noise(rows, k + 1, x.shape[1:]).to(x)
            many = seen.take(np.arange(len(z_M)) // self.candidates)
            copies = x.repeat_interleave(self.candidates, dim=0)
            drawn = kernel.step(engine, rows, copies, many, k, z_M)
            scores = score_rows(engine, rows, drawn, k + 1, steps=self.look_ahead)
            reward_BK = group_rows(scores.total_B, self.candidates)
            refuse_unscored(np.isfinite(reward_BK), drawn)
            tau_B1 = self._tau(reward_BK) if frozen is None else frozen
            frozen = tau_B1 if self.temperature == "first" else None
            z = combine(z_M, demon_weights(reward_BK, tau_B1, self.weights))
            x = kernel.step(engine, unit, x, seen, k, z)
            gains.append(float(np.nanmean(reward_BK)))
        return Result(latents=x, series={"mean reward of the candidates": tuple(gains)})

    def _tau(self, reward_BK: np.ndarray) -> np.ndarray:
        if isinstance(self.temperature, float):
            return np.full((len(reward_BK), 1), self.temperature)
        known = [row[np.isfinite(row)] for row in reward_BK]
        return np.array([[row.std(ddof=1) if len(row) > 1 else 0.0] for row in known])

    def _noisy_steps(self, engine: Engine, unit: Unit) -> list[bool]:
        schedule = schedule_of(engine.path, unit)
        alpha = engine.path.alpha(schedule.levels)
        sigma = engine.path.sigma(schedule.levels)
        above = (sigma > self.stop * alpha).tolist()
        noisy = schedule.stochastic_K.tolist()
        # its own noise, everywhere but in the step to the clean sample, and not where alpha is 0
        if self.beta:
            noisy = [bool(alpha[k] > 0 and sigma[k + 1] > 0) for k in range(unit.plan.steps)]
        return [n and above[k] for k, n in enumerate(noisy)]

    def looks(self, plan: Plan) -> int:
        """All steps but the last taken as noisy."""
        ahead = [min(self.look_ahead, plan.steps - k - 1) for k in range(plan.steps - 1)]
        heun = (1 + self.candidates) * (plan.steps - 1) + 1 if self.beta else 0
        return plan.steps + self.candidates * sum(ahead) + heun


def demon_weights(reward_BK: np.ndarray, tau_B1: np.ndarray, kind: str) -> np.ndarray:
    """(B, K) weights; 0 for a candidate without a reward, and 1 for the first one alone where all
    rewards are equal."""
    known_BK = np.isfinite(reward_BK)
    filled_BK = np.where(known_BK, reward_BK, 0.0)
    mean_B1 = filled_BK.sum(axis=1, keepdims=True) / known_BK.sum(axis=1, keepdims=True)
    gap_BK = np.where(known_BK, reward_BK - mean_B1, 0.0)
    safe_B1 = np.maximum(tau_B1, 1e-30)
    if kind == "tanh":
        w_BK = np.tanh(gap_BK / safe_B1)
    elif kind == "boltzmann":
        w_BK = normalise(np.where(known_BK, gap_BK / safe_B1, -np.inf))
    else:
        w_BK = gap_BK
    first_BK = np.zeros_like(w_BK)
    first_BK[np.arange(len(w_BK)), known_BK.argmax(axis=1)] = 1.0
    same_B1 = np.abs(gap_BK).max(axis=1, keepdims=True) < 1e-8 * np.maximum(1.0, np.abs(mean_B1))
    return np.where(same_B1, first_BK, w_BK)


def combine(z_M: torch.Tensor, w_BK: np.ndarray) -> torch.Tensor:
    """(B, ...) sum of w_k z_k, scaled to norm sqrt(dimensions); a single weight keeps its noise as
    it is."""
    batch, count = w_BK.shape
    z_BK = z_M.reshape(batch, count, *z_M.shape[1:])
    mixed = []
    for b in range(batch):
        used = np.flatnonzero(w_BK[b])
        if len(used) == 1 and w_BK[b, used[0]] > 0:
            mixed.append(z_BK[b, used[0]])
            continue
        w_K = torch.from_numpy(w_BK[b]).to(z_M)
        total = torch.einsum("k,k...->...", w_K, z_BK[b])
        mixed.append(total * (math.sqrt(total.numel()) / total.norm().clamp(min=1e-30)))
    return torch.stack(mixed)


class _Planned(NamedTuple):
    """The plan's own Gaussian steps."""

    def step(
        self, engine: Engine, rows: Unit, x: torch.Tensor, seen: View, k: int, z: torch.Tensor
    ) -> torch.Tensor:
        return seen.gaussian.sample(z)

    def quiet(self, engine: Engine, unit: Unit, x: torch.Tensor, k: int) -> torch.Tensor:
        levels = schedule_of(engine.path, unit).levels
        seen = look_rows(engine, unit, x, k)
        if float(seen.gaussian.std.max()) > 0:
            return _scaled(engine, levels[k + 1], seen, x)
        return seen.gaussian.mean


def _scaled(engine: Engine, level: torch.Tensor, seen: View, like: torch.Tensor) -> torch.Tensor:
    """The step without noise: the probability-flow ODE by DDIM."""
    alpha, sigma = coefficients(engine.path, level, like)
    return alpha * seen.clean + sigma * seen.noise


class _Heun(NamedTuple):
    """dx = (1 + beta s) e ds + sqrt(2 beta) s dW in x / alpha, with s = sigma / alpha; one Heun
    step with one noise."""

    beta: float

    def step(
        self, engine: Engine, rows: Unit, x: torch.Tensor, seen: View, k: int, z: torch.Tensor
    ) -> torch.Tensor:
        return self._heun(engine, rows, x, seen, k, z, self.beta)

    def quiet(self, engine: Engine, unit: Unit, x: torch.Tensor, k: int) -> torch.Tensor:
        return self._heun(
            engine, unit, x, look_rows(engine, unit, x, k), k, torch.zeros_like(x), 0.0
        )

    def _heun(
        self,
        engine: Engine,
        rows: Unit,
        x: torch.Tensor,
        seen: View,
        k: int,
        z: torch.Tensor,
        beta: float,
    ) -> torch.Tensor:
        levels = schedule_of(engine.path, rows).levels
        alpha, sigma = coefficients(engine.path, levels[k], x)
        alpha_next, sigma_next = coefficients(engine.path, levels[k + 1], x)
        if float(alpha.reshape(-1)[0]) == 0.0 or float(sigma_next.reshape(-1)[0]) == 0.0:
            # all noise, or the clean sample: Euler's step is the only one
            return _scaled(engine, levels[k + 1], seen, x)
        s = sigma / alpha
        s_next = sigma_next / alpha_next
        gap = s_next - s
        root = (-gap).sqrt()
        here = (1.0 + beta * s) * seen.noise
        push = math.sqrt(2.0 * beta) * s * z * root
        push_next = math.sqrt(2.0 * beta) * s_next * z * root
        guess = x / alpha + here * gap + push
        noise = seen.noise
        if k + 1 < rows.plan.steps:
            noise = look_rows(engine, rows, guess * alpha_next, k + 1).noise
        moved = (
            x / alpha
            + 0.5 * (here + (1.0 + beta * s_next) * noise) * gap
            + 0.5 * (push + push_next)
        )
        return moved * alpha_next
