"""A lane of a learner: a policy with the value network beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from rlalign.core.batches import ImagePass
from rlalign.learning.lanes import Lane
from tests.toy import ToyPolicy, make_units


def a_pass() -> ImagePass:
    (unit,) = make_units(1)
    clean = torch.zeros(3, 2, 1, 1)
    return ImagePass(
        unit=unit, clean_BCHW=clean, weight_B=torch.ones(3), number=0, draws=1, key=(1,), weight=1.0
    )


def loss(batch: Any, policy: Any, critic: torch.nn.Module | None = None) -> Any:
    given = torch.full((1, 2), float(len(batch.weight_B)))
    return SimpleNamespace(value=None if critic is None else critic(given).sum())


def test_a_loss_is_given_the_value_network_of_its_own_lane() -> None:
    """A replica has the same weights and gradients of its own; updates in place reach both."""
    first = Lane(ToyPolicy(), torch.nn.Linear(2, 1))
    second = first.replica()
    assert first.critic is not None and second.critic is not None
    assert list(first.parameters()) == list(second.parameters())
    assert {"critic/weight", "critic/bias"} <= first.parameters().keys()
    second.loss_of(a_pass(), loss).value.backward()
    assert first.critic.weight.grad is None
    assert second.critic.weight.grad.tolist() == [[3.0, 3.0]]
    with torch.no_grad():
        for parameter in first.parameters().values():
            parameter.add_(1.0)
    for mine, other in zip(first.parameters().values(), second.parameters().values(), strict=True):
        assert torch.equal(mine, other)


def test_a_lane_without_one_says_nothing_of_it() -> None:
    lane = Lane(ToyPolicy()).replica()
    assert lane.critic is None
    assert lane.loss_of(a_pass(), lambda batch, policy: policy) is lane.policy
