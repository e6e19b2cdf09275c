"""Denoising as a decision process: produce trajectories, and take their log-probs again under other
weights.

Knows no policy by name: it takes anything with ``encode``, ``denoise``, ``decode``,
``latent_shape`` and a ``path``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch

from rlalign.core.finite import NotFinite, message, watching
from rlalign.core.media import as_uint8
from rlalign.core.records import Plan, Trajectory, Unit, kept_latents
from rlalign.diffusion.noise import noisy_steps, unit_noise
from rlalign.diffusion.paths import NoisePath
from rlalign.diffusion.steps import Gaussian, is_stochastic, noise_of, step


class Denoiser(Protocol):
    """What a rollout needs of a policy."""

    @property
    def path(self) -> NoisePath: ...
    @property
    def device(self) -> str: ...

    def encode(self, prompts: Sequence[str], plan: Plan) -> Any: ...
    def denoise(
        self, x: torch.Tensor, level: torch.Tensor, condition: Any, guidance: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...
    def latent_shape(self, plan: Plan) -> tuple[int, ...]: ...


@torch.no_grad()
def rollout(
    policy: Denoiser, unit: Unit, version: int, *, start: torch.Tensor | None = None
) -> tuple[Trajectory, np.ndarray]:
    """``denoise_unit``, decoded: its trajectory and its media, uint8 of shape (B, F, 3, H, W).

    Raises NotFinite where the latents or the pictures are not finite, in the name of the part of
    the policy at fault.
    """
    trajectory, clean = denoise_unit(policy, unit, version, start=start)
    return trajectory, as_uint8(policy.decode(clean))


@torch.no_grad()
def denoise_unit(
    policy: Denoiser, unit: Unit, version: int, *, start: torch.Tensor | None = None
) -> tuple[Trajectory, torch.Tensor]:
    """Denoises one unit. Returns its trajectory and its clean latents (B, *latent), on the policy's
    device.

    The chain begins at ``start`` (B, *latent), or where none is given at the unit's own noise.

    Raises NotFinite where the latents are not finite, in the name of the part of the policy at
    fault.

    Latents are stored in float32; the log-prob is taken of, and the chain goes on from, what is
    stored.
    """
    # the chain, with the log-prob of every latent, and the latents that are learned from
    shape = policy.latent_shape(unit.plan)
    condition = policy.encode(unit.prompts, unit.plan)
    schedule = schedule_of(policy.path, unit)
    noise = unit_noise(unit, 0, shape) if start is None else start
    first = noise.to(policy.device, torch.float32)
    kept = kept_latents(unit.plan, schedule.stochastic_K.tolist())
    x = first
    latents = [x] if 0 in kept else []
    log_probs = []
    for k in range(unit.plan.steps):
        found, drawn = advance(policy, unit, schedule, k, x, condition)
        x = drawn.float()
        log_probs.append(found.gaussian.log_prob(x))
        if k + 1 in kept:
            latents.append(x)

    # what is handed on of it
    trajectory = Trajectory(
        unit=unit,
        policy_version=version,
        latents_BK1=torch.stack(latents, dim=1).cpu().numpy(),
        log_prob_BK=torch.stack(log_probs, dim=1).float().cpu().numpy(),
        stochastic_K=schedule.stochastic_K.numpy(),
    )

    # it stays so to the chain's end
    if not np.isfinite(trajectory.latents_BK1[:, -1]).all():
        refuse_latents(policy, unit, schedule, first, condition)
    return trajectory, x


def refuse_latents(
    policy: Any, unit: Unit, schedule: Schedule, first: torch.Tensor, condition: Any
) -> NoReturn:
    """Raises NotFinite for a unit whose chain from ``first`` (B, *latent) does not stay finite, by
    the step that it is not finite from and the part of the policy at fault."""
    # the same chain again, up to that step
    x = first
    for k in range(unit.plan.steps):
        after = advance(policy, unit, schedule, k, x, condition)[1].float()
        if not bool(torch.isfinite(after).all()):
            break
        x = after

    # that step once more, with an eye on the parts
    where = f"at step {k + 1} of {unit.plan.steps}"
    with watching(where):
        advance(policy, unit, schedule, k, x, condition)
    raise NotFinite(
        message(
            f"plan.rule {unit.plan.rule}",
            "the denoiser's answer is finite; take other steps or rule",
            where,
        )
    )


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
    plan = unit.plan
    levels = path.at(plan).levels(plan.steps)
    noisy = noisy_steps(unit)
    stochastic_K = is_stochastic(path, levels, **noise_of(plan)) & torch.tensor(noisy)
    return Schedule(levels, tuple(plan.eta if n else 0.0 for n in noisy), stochastic_K)


def advance(
    policy: Denoiser, unit: Unit, schedule: Schedule, k: int, x: torch.Tensor, condition: Any
) -> tuple[Denoised, torch.Tensor]:
    """Step k of a unit from latent ``x``: what the policy saw, and the next latent with the unit's
    own noise."""
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
    """One step from ``level`` to ``level_next`` (scalars or (B,)) under the plan's rule and
    guidance, with noise ``eta``."""
    clean, noise = policy.denoise(x, level, condition, plan.guidance)
    how = {**noise_of(plan), "eta": eta}
    gaussian = step(x, clean, noise, policy.path, level, level_next, **how)
    return Denoised(gaussian, clean, noise)


def moves(latents_BK1: torch.Tensor, steps: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, ...) the latents that these steps of a trajectory started from, and those that they
    went to."""
    chosen = list(steps)
    return latents_BK1[:, chosen], latents_BK1[:, [k + 1 for k in chosen]]


def by_step(x_BS: torch.Tensor) -> torch.Tensor:
    """(B, S, ...) as (S * B, ...): row s * B + b is sample b at the s-th step."""
    return x_BS.transpose(0, 1).flatten(0, 1)


def replay(
    policy: Denoiser, unit: Unit, before_BS: torch.Tensor, steps: Sequence[int], condition: Any
) -> Denoised:
    """The policy's Gaussian, clean sample and noise at the given stochastic steps of a stored
    trajectory, in one pass.

    ``before_BS`` (B, S, ...) are the latents that the S steps started from. Gives tensors of shape
    (S * B, ...) in the order of ``by_step``. With one step the pass has the rollout's own shape, so
    on one device and thread count its log-prob equals the stored one bit for bit. ``condition`` is
    that of the unit's B prompts, repeated S times.
    """
    plan = unit.plan
    levels = policy.path.at(plan).levels(plan.steps)
    if len(steps) == 1:
        k = steps[0]
        return denoised(
            policy, before_BS[:, 0], levels[k], levels[k + 1], condition, plan, plan.eta
        )
    rows = before_BS.shape[0]
    index = torch.as_tensor(list(steps))
    x = by_step(before_BS)
    now = levels[index].repeat_interleave(rows)
    then = levels[index + 1].repeat_interleave(rows)
    return denoised(policy, x, now, then, condition, plan, plan.eta)


def replay_log_prob(
    policy: Denoiser,
    unit: Unit,
    before_BS: torch.Tensor,
    after_BS: torch.Tensor,
    steps: Sequence[int],
    condition: Any,
) -> tuple[torch.Tensor, Denoised]:
    """(B, S) log-probs, nats per element, of the latents that the steps went to, and the steps that
    they are taken under."""
    found = replay(policy, unit, before_BS, steps, condition)
    log_prob = found.gaussian.log_prob(by_step(after_BS))
    return log_prob.reshape(len(steps), before_BS.shape[0]).transpose(0, 1), found
