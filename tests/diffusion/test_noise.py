"""Noise depends on its key alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.diffusion.noise import generator, noise_masks, noisy_steps, normal, unit_noise

SHAPE = (2, 4, 4)
KEY = ("noise", 7, "train", 3, 123456789012345678, 2, 5)
UNIT = Unit(
    key=UnitKey("train", 3, 1),
    prompts=("a", "a", "b"),
    prompt_ids=(11, 11, 2**62 + 5),
    sample_ids=(0, 1, 0),
    seed=7,
    plan=Plan(),
)


def test_the_same_key_gives_the_same_bits():
    assert torch.equal(normal(KEY, SHAPE), normal(KEY, SHAPE))
    assert normal(KEY, SHAPE).dtype == torch.float32
    assert normal(KEY, SHAPE).shape == SHAPE


def test_the_bits_are_these():
    """Pinned: other numbers here mean that runs of an earlier version cannot be repeated."""
    expected = torch.tensor([-0.6911964416503906, 0.8707169890403748, 0.3159775137901306])
    assert torch.equal(normal(KEY, (3,)), expected)


@pytest.mark.parametrize("part", range(len(KEY)))
def test_every_part_of_the_key_counts(part):
    other = list(KEY)
    other[part] = other[part] + 1 if isinstance(other[part], int) else other[part] + "x"
    assert not torch.isin(normal(other, SHAPE), normal(KEY, SHAPE)).any()


def test_the_order_of_the_parts_counts():
    assert not torch.equal(
        normal(("noise", 1, 2, 3, 4), SHAPE), normal(("noise", 1, 3, 2, 4), SHAPE)
    )


@pytest.mark.parametrize("seed", [-1, 2**63 - 1, 2**64 - 2])
def test_any_integer_is_a_seed(seed):
    assert torch.isfinite(normal(("noise", seed), SHAPE)).all()
    assert not torch.equal(normal(("noise", seed), SHAPE), normal(("noise", 1), SHAPE))


def test_a_units_rows_do_not_depend_on_their_neighbours():
    """Independent of batch composition: alone, or in another order, a sample has the same noise."""
    whole = unit_noise(UNIT, 4, SHAPE)
    assert whole.shape == (3, *SHAPE)
    for order in ([0], [1], [2], [2, 0], [2, 1, 0]):
        part = replace(
            UNIT,
            key=UnitKey("train", 3, 9),
            prompts=tuple(UNIT.prompts[i] for i in order),
            prompt_ids=tuple(UNIT.prompt_ids[i] for i in order),
            sample_ids=tuple(UNIT.sample_ids[i] for i in order),
        )
        assert torch.equal(unit_noise(part, 4, SHAPE), whole[order])


def test_nor_on_the_plan():
    assert torch.equal(
        unit_noise(replace(UNIT, plan=Plan(steps=3, eta=0.2)), 1, SHAPE), unit_noise(UNIT, 1, SHAPE)
    )


def test_units_differ_in_seed_stream_round_prompt_sample_and_step():
    base = unit_noise(UNIT, 0, SHAPE)
    others = [
        unit_noise(UNIT, 1, SHAPE),
        unit_noise(replace(UNIT, seed=8), 0, SHAPE),
        unit_noise(replace(UNIT, key=UnitKey("evaluate", 3, 1)), 0, SHAPE),
        unit_noise(replace(UNIT, key=UnitKey("train", 4, 1)), 0, SHAPE),
        unit_noise(replace(UNIT, prompt_ids=(12, 12, 13)), 0, SHAPE),
        unit_noise(replace(UNIT, sample_ids=(3, 4, 5)), 0, SHAPE),
    ]
    for other in others:
        assert not torch.isin(other, base).any()
    assert len(torch.unique(base)) == base.numel(), "the rows of a unit differ"


def test_it_is_standard_normal_over_keys():
    """10 000 keys, 8 numbers each: mean, variance, 3rd and 4th moment within 4.5 standard errors;
    keys uncorrelated."""
    x = np.stack(
        [normal(("noise", 0, "train", 1, p, 0, 0), (8,)).numpy() for p in range(10_000)]
    ).astype(np.float64)
    n = x.size
    assert abs(x.mean()) < 4.5 * np.sqrt(1 / n)
    assert abs(x.var() - 1) < 4.5 * np.sqrt(2 / n)
    assert abs((x**3).mean()) < 4.5 * np.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4.5 * np.sqrt(96 / n)
    assert abs((x[1:] * x[:-1]).mean()) < 4.5 * np.sqrt(1 / n), "neighbouring keys"
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 4.5 * np.sqrt(1 / n), "neighbouring numbers"


def test_generators_are_numpys_philox():
    ours, again = generator("prompts", 0, 1), generator("prompts", 0, 1)
    assert type(ours.bit_generator) is np.random.Philox
    assert ours.integers(2**63, size=4).tolist() == again.integers(2**63, size=4).tolist()


@pytest.mark.parametrize(
    ("steps", "window", "places"), [(8, 2, 3), (10, 5, 1), (5, 2, 1), (10, 1, 5)]
)
def test_a_window_lies_in_the_first_half(steps, window, places):
    """At each of its places alike: 60 rounds meet them all, and no step of the second half is ever
    noisy."""
    plan = Plan(steps=steps, window=window)
    masks = noise_masks(plan)
    assert len(masks) == places
    assert all(sum(mask) == window and not any(mask[steps // 2 :]) for mask in masks)
    seen = {
        tuple(noisy_steps(replace(UNIT, plan=plan, key=UnitKey("train", r, 0)))) for r in range(60)
    }
    assert seen == {tuple(mask) for mask in masks}


@pytest.mark.parametrize(("place", "places"), [("anywhere", 7), ("end", 1)])
def test_a_window_lies_where_the_plan_says(place, places):
    plan = Plan(steps=8, window=2, window_place=place)
    masks = noise_masks(plan)
    assert len(masks) == places
    assert all(sum(mask) == 2 and mask[mask.index(True) + 1] for mask in masks)
    assert masks[-1] == [False] * 6 + [True] * 2
    seen = {
        tuple(noisy_steps(replace(UNIT, plan=plan, key=UnitKey("train", r, 0)))) for r in range(60)
    }
    assert seen == {tuple(mask) for mask in masks}


def test_without_a_window_every_step_may_be_noisy():
    assert noisy_steps(replace(UNIT, plan=Plan(steps=3))) == [True] * 3
