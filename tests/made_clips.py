"""Clips that tests send through files: moving, frozen and partly frozen ones."""

from __future__ import annotations

import numpy as np

from rlalign.core.records import Plan, Scored, Unit, UnitKey

FRAMES = 9
PLAN = Plan(steps=2, frames=FRAMES, height=16, width=24)


def made_clips(count: int, seed: int = 0, frames: int = FRAMES) -> np.ndarray:
    """(N, F, 3, 16, 24) uint8: of three clips in a row the second stands still, the third in its
    middle."""
    rng = np.random.default_rng([9, seed])
    media_NFCHW = rng.integers(0, 256, (count, frames, 3, 16, 24), dtype=np.uint8)
    media_NFCHW[1::3] = media_NFCHW[1::3, :1]
    media_NFCHW[2::3, 3:7] = media_NFCHW[2::3, 3:4]
    return media_NFCHW


def scored_clips(media_NFCHW: np.ndarray, per_prompt: int = 1) -> Scored:
    """A unit of these clips, whose rewards are 0, 1, 2 ...; ``per_prompt`` are of one prompt."""
    count = len(media_NFCHW)
    numbers = [i // per_prompt for i in range(count)]
    unit = Unit(
        key=UnitKey("train", 1, 0),
        prompts=tuple(f"prompt {number}" for number in numbers),
        prompt_ids=tuple(numbers),
        sample_ids=tuple(i % per_prompt for i in range(count)),
        seed=0,
        plan=PLAN.model_copy(update={"frames": media_NFCHW.shape[1]}),
    )
    total_B = np.arange(count, dtype=np.float32)
    return Scored(
        unit=unit,
        policy_version=0,
        raw={"motion": total_B},
        total_B=total_B,
        media_BFCHW=media_NFCHW,
    )
