"""Noise that depends on its key alone: (seed, stream, round, prompt, sample, step), never on a
worker's state.

Counter-based: Philox 4x64 (Salmon 2011), keyed by NumPy's SeedSequence over the whole tuple.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from rlalign.core.records import Plan, Unit


def generator(*key: int | str) -> np.random.Generator:
    """A generator that depends on the key alone. Strings enter by their CRC-32."""
    entropy = [
        zlib.crc32(k.encode()) if isinstance(k, str) else int(k) & 0xFFFFFFFFFFFFFFFF for k in key
    ]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def normal(key: Sequence[int | str], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal float32 of this shape, from the key alone."""
    return torch.from_numpy(generator(*key).standard_normal(tuple(shape), dtype=np.float32))


def unit_noise(unit: Unit, step: int, shape: Sequence[int]) -> torch.Tensor:
    """(B, *shape) noise of one denoising step of a unit; step 0 is the starting latent, step k + 1
    belongs to step k."""
    return noise_for(unit, "noise", (step,), shape)


def noise_for(
    unit: Unit, purpose: str, place: Sequence[int | str], shape: Sequence[int]
) -> torch.Tensor:
    """(B, *shape) noise of a unit for a named purpose, apart from that of every other purpose and
    place."""
    key = unit.key
    rows = [
        normal((purpose, unit.seed, key.stream, key.round, prompt, sample, *place), shape)
        for prompt, sample in zip(unit.prompt_ids, unit.sample_ids, strict=True)
    ]
    return torch.stack(rows)


def row_generator(unit: Unit, row: int, purpose: str, *place: int | str) -> np.random.Generator:
    """A generator keyed by a row of a unit, for a named purpose."""
    key = unit.key
    ids = (unit.prompt_ids[row], unit.sample_ids[row])
    return generator(purpose, unit.seed, key.stream, key.round, *ids, *place)


def noisy_steps(unit: Unit) -> list[bool]:
    """Per denoising step of a unit's plan: whether it may be stochastic.

    All of them, or a window of neighbouring steps. It lies in the first half of the plan or
    anywhere, at a place that is drawn for the round and the same for all its units (Flow-GRPO-Fast;
    MixGRPO, Li 2025, arXiv:2507.21802), or at the end (DPPO, Ren 2024, arXiv:2409.00588, which
    fine-tunes the last steps).
    """
    masks = noise_masks(unit.plan)
    rng = generator("window", unit.seed, unit.key.stream, unit.key.round)
    return masks[int(rng.integers(len(masks)))]


def noise_masks(plan: Plan) -> list[list[bool]]:
    """Every mask that ``noisy_steps`` may say: one for each place of the plan's window, or all
    steps without one."""
    window = plan.window or plan.steps
    last = plan.steps // 2 if plan.window and plan.window_place == "first_half" else plan.steps
    first = plan.steps - window if plan.window_place == "end" else 0
    masks = []
    for start in range(first, last - window + 1):
        masks.append([start <= k < start + window for k in range(plan.steps)])
    return masks
