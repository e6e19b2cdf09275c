"""Denoising as a decision process: produce trajectories, and take their log-probs again under other weights.

Knows no policy by name: it takes anything with ``encode``, ``denoise``, ``decode``, ``latent_shape`` and a ``path``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from rlalign.diffusion.noise import unit_noise
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
    plan = unit.plan
    shape = policy.latent_shape(plan)
    condition = policy.encode(unit.prompts)
    levels = policy.path.levels(plan.steps)
    stochastic = is_stochastic(policy.path, levels, rule=plan.rule, eta=plan.eta)
    x = _stored(unit_noise(unit, 0, shape), store, policy.device)
    latents, log_probs = [x], []
    for k in range(plan.steps):
        gaussian = _gaussian(policy, x, levels[k], levels[k + 1], condition, plan)
        drawn = gaussian.sample(unit_noise(unit, k + 1, shape).to(x)) if stochastic[k] else gaussian.mean
        x = _stored(drawn, store, policy.device)
        latents.append(x)
        log_probs.append(gaussian.log_prob(x))
    trajectory = Trajectory(
        unit=unit,
        policy_version=version,
        latents_BK1=torch.stack(latents, dim=1).cpu().numpy().astype(store),
        log_prob_BK=torch.stack(log_probs, dim=1).float().cpu().numpy(),
        stochastic_K=stochastic.numpy(),
    )
    media = (policy.decode(x) * 255.0).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return trajectory, media


def replay(policy: Denoiser, unit: Unit, latents_BK1: torch.Tensor, steps: Sequence[int], condition: Any) -> Gaussian:
    """The policy's Gaussian at the given steps of a stored trajectory, in one pass.

    Returns mean of shape (S * B, ...), step by step: row s * B + b is sample b at ``steps[s]``. With one step the pass has
    the rollout's own shape, so on one device and thread count its log-prob equals the stored one bit for bit. ``condition``
    is that of the unit's B prompts, repeated S times.
    """
    plan = unit.plan
    levels = policy.path.levels(plan.steps)
    if len(steps) == 1:
        k = steps[0]
        return _gaussian(policy, latents_BK1[:, k], levels[k], levels[k + 1], condition, plan)
    rows = latents_BK1.shape[0]
    index = torch.as_tensor(list(steps))
    x = latents_BK1[:, index].transpose(0, 1).flatten(0, 1)
    return _gaussian(
        policy, x, levels[index].repeat_interleave(rows), levels[index + 1].repeat_interleave(rows), condition, plan
    )


def replay_log_prob(
    policy: Denoiser, unit: Unit, latents_BK1: torch.Tensor, steps: Sequence[int], condition: Any
) -> tuple[torch.Tensor, Gaussian]:
    """(B, S) log-probs, nats per element, of the stored next latents, and the Gaussian they were taken under."""
    gaussian = replay(policy, unit, latents_BK1, steps, condition)
    rows = latents_BK1.shape[0]
    taken = latents_BK1[:, [k + 1 for k in steps]].transpose(0, 1).flatten(0, 1)
    return gaussian.log_prob(taken).reshape(len(steps), rows).transpose(0, 1), gaussian


def _gaussian(
    policy: Denoiser, x: torch.Tensor, level: torch.Tensor, level_next: torch.Tensor, condition: Any, plan: Plan
) -> Gaussian:
    clean, noise = policy.denoise(x, level, condition, plan.guidance)
    return step(x, clean, noise, policy.path, level, level_next, rule=plan.rule, eta=plan.eta)


def _stored(x: torch.Tensor, store: np.dtype[Any] | type, device: str) -> torch.Tensor:
    kind = torch.float16 if np.dtype(store) == np.float16 else torch.float32
    return x.to(device=device, dtype=kind).to(torch.float32)
