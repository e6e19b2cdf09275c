"""The losses on pairs against what they are known to be: oracles O14 and O14b, and an update's
parts against the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlalign.algorithms._objectives import preference_loss
from rlalign.data.pairs.columns import write_pairs
from rlalign.data.pairs.ranking import encode
from rlalign.data.pairs.reader import PairReader, PreferenceSettings
from rlalign.fitting.reward.losses import (
    bradley_terry_loss,
    pair_losses,
    rao_kupper,
    rao_kupper_loss,
    weights,
)
from rlalign.fitting.reward.settings import FitReward
from rlalign.networks.towers import build_towers

UTILITIES = torch.tensor([0.0, 0.7, -1.1, 2.0])


def comparisons(count: int, theta: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 2) items compared, and (N,) labels of the first, drawn from Bradley-Terry or
    Rao-Kupper."""
    rng = np.random.default_rng(seed)
    first = rng.integers(4, size=count)
    second = (first + rng.integers(1, 4, size=count)) % 4
    items = torch.from_numpy(np.stack([first, second], axis=1))
    wins, loses, _ = rao_kupper(UTILITIES[items[:, 0]] - UTILITIES[items[:, 1]], theta)
    drawn = torch.from_numpy(rng.random(count))
    label = torch.where(drawn < wins, 1.0, torch.where(drawn < wins + loses, 0.0, 0.5))
    return items, label


def fitted(items: torch.Tensor, label: torch.Tensor, theta: float = 1.0) -> torch.Tensor:
    """Utilities relative to the first item, by Newton-like minimisation (LBFGS) of the mean
    loss."""
    score = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([score], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        a, b = score[items[:, 0]], score[items[:, 1]]
        found = (
            bradley_terry_loss(a, b, label) if theta == 1.0 else rao_kupper_loss(a, b, label, theta)
        )
        loss = found.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (score - score[0]).detach()


def test_utilities_are_recovered_from_200000_comparisons() -> None:
    """O14. Some 67 000 comparisons per item leave a standard error of at most 0.011; the margin is
    three of them."""
    found = fitted(*comparisons(200_000))
    assert (found - UTILITIES).abs().max() < 0.035


def test_utilities_are_recovered_where_there_are_ties() -> None:
    found = fitted(*comparisons(200_000, theta=2.0), theta=2.0)
    assert (found - UTILITIES).abs().max() < 0.035


def test_a_constant_changes_nothing_and_a_tie_costs_ln_2() -> None:
    a, b = torch.randn(2, 64, dtype=torch.float64)
    label = torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=torch.float64).repeat(16)
    torch.testing.assert_close(
        bradley_terry_loss(a + 3.5, b + 3.5, label), bradley_terry_loss(a, b, label)
    )
    torch.testing.assert_close(
        rao_kupper_loss(a - 2, b - 2, label, 1.5), rao_kupper_loss(a, b, label, 1.5)
    )
    assert bradley_terry_loss(
        torch.zeros(1), torch.zeros(1), torch.full((1,), 0.5)
    ).item() == pytest.approx(math.log(2))
    torch.testing.assert_close(bradley_terry_loss(a, b, torch.ones_like(a)), preference_loss(a - b))
    torch.testing.assert_close(bradley_terry_loss(a, b, label), bradley_terry_loss(b, a, 1 - label))


@pytest.mark.parametrize("theta", [1.0, 1.3, 5.0])
def test_rao_kuppers_probabilities_sum_to_1_and_theta_1_is_bradley_terry(theta: float) -> None:
    """O14b, at differences from -30 to 30."""
    d = torch.linspace(-30, 30, 241, dtype=torch.float64)
    wins, loses, ties = rao_kupper(d, theta)
    torch.testing.assert_close(wins + loses + ties, torch.ones_like(d))
    assert (ties >= 0).all() and torch.equal(wins, loses.flip(0))
    if theta == 1.0:
        torch.testing.assert_close(wins, torch.sigmoid(d))
        assert (ties == 0).all()
    else:
        assert int(ties.argmax()) == 120, "a tie is likeliest between equals"
        seen = [(1.0, wins), (0.0, loses), (0.5, ties)]
        for label, probability in seen:
            loss = rao_kupper_loss(d, torch.zeros_like(d), torch.full_like(d, label), theta)
            torch.testing.assert_close(loss, -probability.log(), rtol=1e-6, atol=1e-9)


def test_losses_stay_finite_at_large_differences() -> None:
    a = torch.tensor([200.0, -200.0], requires_grad=True)
    for theta in (1.0, 2.0):
        loss = (
            bradley_terry_loss(a, -a, torch.ones(2))
            if theta == 1
            else rao_kupper_loss(a, -a, torch.ones(2), theta)
        )
        (gradient,) = torch.autograd.grad(loss.sum(), a)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("by_prompt", [True, False])
def test_the_parts_of_an_update_sum_to_its_weighted_mean(tmp_path, by_prompt: bool) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 10, 3, 32, 32), dtype=np.uint8)
    rows = [
        {
            "caption": "a red circle" if n < 7 else "a blue square",
            "jpg_0": encode(pictures[0, n]),
            "jpg_1": encode(pictures[1, n]),
            "label_0": float(n % 2),
            "label_1": 1.0 - n % 2,
        }
        for n in range(10)
    ]
    write_pairs(tmp_path / "p.parquet", rows)
    file = str(tmp_path / "p.parquet")
    config = FitReward.model_validate(
        {"preferences": {"path": file}, "fit": {"weight_by_prompt": by_prompt}}
    )
    towers = build_towers("tiny").eval()
    found = {}
    for size in (10, 3):
        reader = PairReader(
            PreferenceSettings(path=file, pairs_per_round=10, pairs_per_pass=size), seed=0
        )
        parts = list(pair_losses(towers, config, reader)(0))
        assert len(parts) == -(-10 // size)
        found[size] = sum(parts)
    torch.testing.assert_close(found[10], found[3])
    pairs = reader.round(0)
    weight = weights(pairs, reader, config.fit)
    assert set(weight.tolist()) == (
        {torch.tensor(1 / 7).item(), torch.tensor(1 / 3).item()} if by_prompt else {1.0}
    )
    media = torch.from_numpy(np.stack([[p.media_0, p.media_1] for p in pairs])).float() / 255
    score = torch.stack([towers(media[:, i], [p.caption for p in pairs]) for i in (0, 1)])
    sign = torch.tensor([1.0 if p.label_0 == 1 else -1.0 for p in pairs])
    expected = (
        weight * -torch.nn.functional.logsigmoid(sign * (score[0] - score[1]))
    ).sum() / weight.sum()
    torch.testing.assert_close(found[10], expected, rtol=1e-4, atol=1e-5)
