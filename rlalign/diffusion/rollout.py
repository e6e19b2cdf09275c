"""Denoising as a decision process: produce trajectories, and take their log-probs again under other weights.

Knows no policy by name: it takes anything with ``encode``, ``denoise``, ``decode``, ``latent_shape`` and a ``path``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from rlalign.diffusion.noise import noisy_steps, unit_noise
from rlalign.diffusion.paths import NoisePath
from rlalign.diffusion.steps import Gaussian, is_stochastic, step
from rlalign.records import Plan, Trajectory, Unit


class Denoiser(Protocol):
    """What a rollout needs of a policy."""

    path: NoisePath
    device: str

    def encode(self, prompts: Sequence[str]) -> Any: ...
    def denoise(
        self, x: torch.Tensor, level: torch.Tensor, condition: Any, guidance: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...
    def latent_shape(self, plan: Plan) -> tuple[int, ...]: ...


@torch.no_grad()
def rollout(
    policy: Denoiser, unit: Unit, version: int, *, store: np.dtype[Any] | type = np.float32
) -> tuple[Trajectory, np.ndarray]:
    """Denoises one unit. Returns its trajectory and its media, uint8 of shape (B, F, 3, H, W).

    Latents are rounded to the storage type first; the log-prob is taken of, and the chain goes on from, what is stored.
    """
    shape = policy.latent_shape(unit.plan)
    condition, schedule = policy.encode(unit.prompts), schedule_of(policy.path, unit)
    x = _stored(unit_noise(unit, 0, shape), store, policy.device)
    latents, log_probs = [x], []
    for k in range(unit.plan.steps):
        found, drawn = advance(policy, unit, schedule, k, x, condition)
        x = _stored(drawn, store, policy.device)
        latents.append(x)
        log_probs.append(found.gaussian.log_prob(x))
    trajectory = Trajectory(
        unit=unit,
        policy_version=version,
        latents_BK1=torch.stack(latents, dim=1).cpu().numpy().astype(store, copy=False),
        log_prob_BK=torch.stack(log_probs, dim=1).float().cpu().numpy(),
        stochastic_K=schedule.stochastic_K.numpy(),
    )
    media = (policy.decode(x) * 255.0).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return trajectory, media


class Schedule(NamedTuple):
    """What a unit's plan comes to on a path, step by step."""

    levels: torch.Tensor
    """(K + 1,) float64."""
    eta_K: tuple[float, ...]
    """The plan's eta, 0 outside the plan's window."""
    stochastic_K: torch.Tensor
    """(K,) bool: the steps that have a density."""


def schedule_of(path: NoisePath, unit: Unit) -> Schedule:
    """The schedule of a unit."""
    plan, levels = unit.plan, path.levels(unit.plan.steps)
    noisy = noisy_steps(unit)
    stochastic_K = is_stochastic(path, levels, rule=plan.rule, eta=plan.eta) & torch.tensor(noisy)
    return Schedule(levels, tuple(plan.eta if n else 0.0 for n in noisy), stochastic_K)


def advance(
    policy: Denoiser, unit: Unit, schedule: Schedule, k: int, x: torch.Tensor, condition: Any
) -> tuple[Denoised, torch.Tensor]:
    """Step k of a unit from latent ``x``: what the policy saw, and the next latent with the unit's own noise."""
    levels = schedule.levels
    found = denoised(policy, x, levels[k], levels[k + 1], condition, unit.plan, schedule.eta_K[k])
    if not schedule.stochastic_K[k]:
        return found, found.gaussian.mean
    return found, found.gaussian.sample(unit_noise(unit, k + 1, x.shape[1:]).to(x))


class Denoised(NamedTuple):
    """One denoising step: the Gaussian of the next latent, and what the policy saw."""

    gaussian: Gaussian
    clean: torch.Tensor
    noise: torch.Tensor


def denoised(
    policy: Denoiser,
    x: torch.Tensor,
    level: torch.Tensor,
    level_next: torch.Tensor,
    condition: Any,
    plan: Plan,
    eta: float,
) -> Denoised:
    """One step from ``level`` to ``level_next`` (scalars or (B,)) under the plan's rule and guidance, with noise ``eta``."""
    clean, noise = policy.denoise(x, level, condition, plan.guidance)
    gaussian = step(x, clean, noise, policy.path, level, level_next, rule=plan.rule, eta=eta)
    return Denoised(gaussian, clean, noise)


def replay(policy: Denoiser, unit: Unit, latents_BK1: torch.Tensor, steps: Sequence[int], condition: Any) -> Denoised:
    """The policy's Gaussian, clean sample and noise at the given stochastic steps of a stored trajectory, in one pass.

    Tensors of shape (S * B, ...), step by step: row s * B + b is sample b at ``steps[s]``. With one step the pass has the
    rollout's own shape, so on one device and thread count its log-prob equals the stored one bit for bit. ``condition`` is
    that of the unit's B prompts, repeated S times.
    """
    plan = unit.plan
    levels = policy.path.levels(plan.steps)
    if len(steps) == 1:
        k = steps[0]
        return denoised(policy, latents_BK1[:, k], levels[k], levels[k + 1], condition, plan, plan.eta)
    rows = latents_BK1.shape[0]
    index = torch.as_tensor(list(steps))
    x = latents_BK1[:, index].transpose(0, 1).flatten(0, 1)
    now, then = levels[index].repeat_interleave(rows), levels[index + 1].repeat_interleave(rows)
    return denoised(policy, x, now, then, condition, plan, plan.eta)


def taken(latents_BK1: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
    """(S * B, ...) the stored next latents of these steps, in ``replay``'s order of rows."""
    return latents_BK1[:, [k + 1 for k in steps]].transpose(0, 1).flatten(0, 1)


def replay_log_prob(
    policy: Denoiser, unit: Unit, latents_BK1: torch.Tensor, steps: Sequence[int], condition: Any
) -> tuple[torch.Tensor, Denoised]:
    """(B, S) log-probs, nats per element, of the stored next latents, and the steps they were taken under."""
    found = replay(policy, unit, latents_BK1, steps, condition)
    log_prob = found.gaussian.log_prob(taken(latents_BK1, steps))
    return log_prob.reshape(len(steps), latents_BK1.shape[0]).transpose(0, 1), found


def _stored(x: torch.Tensor, store: np.dtype[Any] | type, device: str) -> torch.Tensor:
    kind = torch.float16 if np.dtype(store) == np.float16 else torch.float32
    return x.to(device=device, dtype=kind).to(torch.float32)
