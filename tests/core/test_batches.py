"""The batches: sliced without changing a mean, and what each pass is told apart by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlalign.core.batches import PairBatch, Pairs, StepBatch
from rlalign.core.records import Plan, Unit, UnitKey


def batch_of(masks, sizes):
    """A StepBatch with one unit per mask; log-probs are a running number, so that slices can be
    told apart."""
    units, number = [], 0
    log_prob = []
    for index, (mask, size) in enumerate(zip(masks, sizes, strict=True)):
        units.append(
            Unit(
                key=UnitKey("train", 1, index),
                prompts=("p",) * size,
                prompt_ids=(1,) * size,
                sample_ids=tuple(range(size)),
                seed=0,
                plan=Plan(steps=len(mask)),
            )
        )
        log_prob.append(
            torch.arange(number, number + size * len(mask), dtype=torch.float32).reshape(
                size, len(mask)
            )
        )
        number += size * len(mask)
    return StepBatch(
        units=tuple(units),
        latents=tuple(
            torch.full((s, len(m) + 1, 1, 1, 1), float(i))
            for i, (m, s) in enumerate(zip(masks, sizes, strict=True))
        ),
        log_prob=tuple(log_prob),
        stochastic=tuple(torch.tensor(m) for m in masks),
        advantage=tuple(torch.arange(s, dtype=torch.float32) for s in sizes),
        reward=tuple(torch.zeros(s) for s in sizes),
    )


def test_picking_keeps_whole_units_in_order():
    batch = batch_of([[True], [True], [True]], [2, 3, 4])
    picked = batch.pick([2, 0])
    assert len(batch) == 9
    assert len(picked) == 6
    assert [u.key.index for u in picked.units] == [2, 0]
    assert [int(t.flatten()[0]) for t in picked.latents] == [2, 0]
    assert [len(t) for t in picked.log_prob] == [len(t) for t in picked.advantage] == [4, 2]


@pytest.mark.parametrize("steps_per_pass", [1, 2, 3, 10])
def test_the_weighted_sum_of_slice_means_is_the_mean_over_pairs(steps_per_pass):
    """Whatever the slicing, with units of different sizes and different deterministic steps."""
    masks = [[True, True, False, True, True], [False, True, True, False, False], [True] * 5]
    batch = batch_of(masks, [2, 3, 1])
    passes = list(batch.passes(steps_per_pass))
    assert sum(p.weight for p in passes) == pytest.approx(1.0, abs=1e-12)
    assert all(1 <= len(p.steps) <= steps_per_pass for p in passes)
    pairs = torch.cat(
        [t[:, m].flatten() for t, m in zip(batch.log_prob, batch.stochastic, strict=True)]
    )
    found = sum(p.weight * p.log_prob_BS.double().mean().item() for p in passes)
    assert found == pytest.approx(pairs.double().mean().item(), abs=1e-12)


def test_a_pass_is_a_slice_of_one_unit():
    batch = batch_of([[True, False, True], [True, True, True]], [2, 1])
    passes = list(batch.passes(2))
    assert [(p.unit.key.index, p.steps) for p in passes] == [(0, (0, 2)), (1, (0, 1)), (1, (2,))]
    first = passes[0]
    assert torch.equal(first.log_prob_BS, batch.log_prob[0][:, [0, 2]])
    assert torch.equal(first.before_BS, batch.latents[0][:, [0, 2]])
    assert torch.equal(first.after_BS, batch.latents[0][:, [1, 3]])
    assert first.side_B is None
    assert first.advantage_B is batch.advantage[0]
    assert [p.weight for p in passes] == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_without_a_density_there_is_nothing_to_learn():
    assert list(batch_of([[False, False]], [2]).passes(1)) == []


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.int64])
def test_a_log_prob_in_half_precision_cannot_be_in_a_batch_or_a_pass(kind):
    """O20: an error of type, also under ``python -O``. float64 is for comparisons."""
    batch = batch_of([[True, True]], [2])
    one = next(batch.passes(1))
    for wide in (torch.float32, torch.float64):
        assert replace(batch, log_prob=(batch.log_prob[0].to(wide),)).log_prob[0].dtype == wide
        assert replace(one, log_prob_BS=one.log_prob_BS.to(wide)).log_prob_BS.dtype == wide
    with pytest.raises(TypeError, match=f"log_prob must be float32 or float64, got {kind}"):
        replace(batch, log_prob=(batch.log_prob[0].to(kind),))
    with pytest.raises(TypeError, match=f"log_prob must be float32 or float64, got {kind}"):
        replace(one, log_prob_BS=one.log_prob_BS.to(kind))


def test_pictures_of_a_set_are_encoded_once_however_many_passes_ask():
    """Two sides of two parts: four calls of the encoder for 3 draws and 2 epochs."""
    seen = []

    def encode(pictures: torch.Tensor, side: int) -> torch.Tensor:
        seen.append((pictures, side))
        return pictures.flatten(1).float().mean(1)

    def part(number: int) -> Pairs:
        sides = torch.arange(24, dtype=torch.uint8).view(2, 1, 1, 3, 2, 2) + number
        label = torch.ones(1)
        return Pairs(
            prompts=("a",),
            first=sides[0],
            second=sides[1],
            label_B=label,
            key=(number,),
            plan=Plan(),
        )

    batch = PairBatch(pairs=(part(0), part(1)), draws=3)
    for epoch in range(2):
        for one in batch.pick([1, 0]).passes(1, (1, epoch)):
            first, second = one.pairs.latents(encode)
            assert first.item() == one.pairs.first.float().mean()
            assert second.item() == one.pairs.second.float().mean()
    assert [side for _, side in seen] == [0, 1, 0, 1]
