"""Pictures of a live policy, asked for in one call: the body of ``Policy.sample``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import UserError, explain
from rlalign.data.prompts.base import prompt_id
from rlalign.diffusion.rollout import Denoiser, rollout

OUTPUTS = ("media", "latents")


def sample(
    policy: Denoiser,
    prompts: Sequence[str],
    settings: dict[str, Any],
    *,
    seed: int,
    latents: torch.Tensor | np.ndarray | None,
    output: str,
) -> torch.Tensor:
    """Media (B, F, 3, H, W) uint8 on the CPU, or final latents (B, *latent) float32 on the
    policy's device. ``settings`` are those of a Plan."""
    # What can be wrong is said before anything is computed.
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"sample: prompts must be a list of at least one text, got {prompts!r}")
    if output not in OUTPUTS:
        raise UserError(f"sample: output must be media or latents, got {output!r}")
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"sample: seed must be a whole number >= 0, got {seed!r}")
    try:
        plan = Plan(**settings)
    except ValidationError as error:
        raise UserError(f"sample: {explain(error, Plan, '')}") from error
    start = None if latents is None else _start(latents, (len(prompts), *policy.latent_shape(plan)))

    # One unit, with the key and the numbers that the sample command gives these prompts.
    unit = Unit(
        key=UnitKey("sample", 0, 0),
        prompts=tuple(prompts),
        prompt_ids=tuple(prompt_id(p) for p in prompts),
        sample_ids=tuple(range(len(prompts))),
        seed=seed,
        plan=plan,
    )
    trajectory, media_BFCHW = rollout(policy, unit, 0, start=start)
    if output == "latents":
        return torch.from_numpy(trajectory.latents_BK1[:, -1].copy()).to(policy.device)
    return torch.from_numpy(media_BFCHW)


def _start(latents: torch.Tensor | np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    start = torch.as_tensor(latents).detach()
    if tuple(start.shape) != shape or not start.is_floating_point():
        raise UserError(
            f"sample: latents must be floating-point numbers of shape {shape}, got {start.dtype} of"
            f" shape {tuple(start.shape)}"
        )
    return start
