"""Pieces of work on the local engine: a unit of a round in its three forms, and what lanes do not
change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import build
from rlalign.diffusion.rollout import rollout
from rlalign.engine import WorkResult
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.engine.pieces import Describe, Pictures, Produce, Rollout
from tests.toy import PLAN, PROMPTS, ToyPolicy

WEIGHT = 0.5


def rewards() -> LiveRewards:
    """One that is followed and one that is held out."""
    followed: Any = build("rewards", {"name": "jpeg", "weight": WEIGHT}, "rewards.0")
    held_out: Any = build("rewards", {"name": "jpeg", "label": "other"}, "evaluate.rewards.0")
    return LiveRewards([followed], [held_out], strict=True)


def unit_of(stream: str, index: int = 0) -> Unit:
    ids = tuple(range(4 * index, 4 * index + 4))
    return Unit(
        key=UnitKey(stream, 1, index),
        prompts=PROMPTS,
        prompt_ids=ids,
        sample_ids=ids,
        seed=0,
        plan=PLAN,
    )


def one(engine: LocalEngine, work: Any) -> WorkResult:
    (done,) = engine.perform([work])
    return done


@pytest.mark.parametrize(
    ("stream", "titles"), [("train", ["jpeg"]), ("evaluate", ["jpeg", "other"])]
)
def test_a_unit_is_the_same_chain_in_each_of_its_forms(stream: str, titles: list[str]) -> None:
    """Alone, with scores, and its pictures alone; who is asked for scores follows from what the
    unit is for."""
    policy = ToyPolicy()
    engine = LocalEngine(policy, [rewards()], rows=4, parallel=False)
    unit = unit_of(stream)
    trajectory, media = rollout(policy, unit, 3)

    alone, alone_samples = one(engine, Rollout(unit=unit, version=3)).value
    scored = one(engine, Produce(unit=unit, version=3))
    pictures = one(engine, Pictures(unit=unit, version=3)).value
    parts = {"rollout", "reward", *(f"reward/{title}" for title in titles)}
    assert scored.value.seconds.keys() == parts
    made = scored.value
    for found in (alone, made.trajectory):
        for name, expected in vars(trajectory).items():
            value = getattr(found, name)
            same = torch.equal if isinstance(expected, torch.Tensor) else np.array_equal
            assert same(value, expected), name
    for found_media in (alone_samples["media"], made.samples["media"], pictures):
        np.testing.assert_array_equal(found_media, media)

    # the total is of the reward that is followed alone
    assert list(made.scores.raw) == titles
    np.testing.assert_array_equal(made.scores.total_B, np.float32(WEIGHT) * made.scores.raw["jpeg"])
    assert scored.cost.denoiser_calls == len(PROMPTS) * PLAN.steps
    assert scored.cost.reward_queries == len(PROMPTS) * len(titles)


def test_lanes_change_no_number_and_the_cost_is_of_all_of_them() -> None:
    units = [unit_of("train", index) for index in range(5)]
    works = [Produce(unit=unit, version=0) for unit in units]
    found = []
    for workers in (1, 3):
        engine = LocalEngine.with_lanes(ToyPolicy(), rewards, workers=workers, rows=4)
        found.append(engine.map(works))
        assert engine.cost.denoiser_calls == 5 * len(PROMPTS) * PLAN.steps
        assert engine.cost.reward_queries == 5 * len(PROMPTS)
    for mine, theirs in zip(*found, strict=True):
        assert np.array_equal(mine.samples["media"], theirs.samples["media"])
        assert np.array_equal(mine.scores.total_B, theirs.scores.total_B)


def test_on_a_gpu_one_lane_is_enough() -> None:
    """The policy stays where it is; only what it says of itself decides here."""
    policy = ToyPolicy()
    policy.family.device = "cuda:1"
    made: list[LiveRewards] = []

    def one_more() -> LiveRewards:
        made.append(LiveRewards(()))
        return made[-1]

    LocalEngine.with_lanes(policy, one_more, workers=3, rows=4)
    assert len(made) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_description_is_what_a_chain_begins_with(dtype: torch.dtype) -> None:
    """Latents are never coarser than float32."""
    policy = ToyPolicy(dtype=dtype)
    engine = LocalEngine(policy, [LiveRewards(())], rows=4, parallel=False)
    unit = unit_of("sample")
    found = one(engine, Describe(unit=unit)).value
    assert found.path is policy.path
    assert found.latent_shape == engine.latent_shape(Plan(steps=3)) == (2, 1, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == engine.begin(unit).dtype == wide
