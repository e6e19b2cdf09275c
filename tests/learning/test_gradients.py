"""Passes that have no gradient: they are left out of the backward pass, and no bit changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import Algorithm, Loss
from rlalign.algorithms.ddpo import DDPO
from rlalign.algorithms.grpo import GRPO
from rlalign.algorithms.reinforce import Reinforce
from rlalign.core.batches import StepBatch
from rlalign.learning.gradients import take_back
from rlalign.learning.learner import Learner
from rlalign.learning.settings import LearnerSettings
from tests.toy import ToyPolicy, collect, make_units

ALGORITHMS: dict[str, Algorithm] = {
    "ddpo": DDPO(clip_range=1e-3, advantage="global"),
    "score function": DDPO(form="score_function", advantage="global"),
    "reinforce": Reinforce(),
    "grpo": GRPO(clip_range=1e-3),
    "grpo with a KL": GRPO(clip_range=1e-3, kl_weight=0.1),
    "grpo with a guard": GRPO(clip_range=1e-3, guard=True),
}


class Counter:
    """Counts the backward passes of a policy's network."""

    def __init__(self, policy: ToyPolicy) -> None:
        self.count = 0
        policy.network.register_forward_hook(self._watch)

    def _watch(self, network: torch.nn.Module, given: Any, answer: torch.Tensor) -> None:
        if answer.requires_grad:
            answer.register_hook(self._add)

    def _add(self, gradient: torch.Tensor) -> None:
        self.count += 1


def trained(
    algorithm: Algorithm, batch: StepBatch, loss: Callable[..., Loss], updates: int
) -> tuple[Learner, dict[str, float], int]:
    """A learner after updates of all parts of a batch, its metrics, and its backward passes."""
    policy = ToyPolicy()
    counter = Counter(policy)
    settings = LearnerSettings(lr=1e-2, updates_per_round=1, epochs=updates)
    learner = Learner(policy, loss, settings, seed=0)
    return learner, learner.update(batch, round=1), counter.count


def batch_of(algorithm: Algorithm, idle: int) -> StepBatch:
    """A batch of eight units, some of which have no advantage."""
    batch = algorithm.make_batch(collect(ToyPolicy(), make_units(8)), Memory())
    assert isinstance(batch, StepBatch)
    advantage = [
        torch.zeros_like(one) if place < idle else one for place, one in enumerate(batch.advantage)
    ]
    return replace(batch, advantage=tuple(advantage))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_units_without_an_advantage_need_no_backward_pass(name: str) -> None:
    algorithm = ALGORITHMS[name]
    batch = batch_of(algorithm, idle=3)

    def whole(*given: Any) -> Loss:
        return replace(algorithm.loss(*given), via=None)

    own, metrics, count = trained(algorithm, batch, algorithm.loss, 1)
    other, others_metrics, others_count = trained(algorithm, batch, whole, 1)
    assert metrics == others_metrics
    for tensor, same in zip(own.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, same)
    assert count * 8 == others_count * 5


def test_clipped_passes_need_none_either() -> None:
    algorithm = DDPO(clip_range=1e-6, advantage="global")
    batch = batch_of(algorithm, idle=0)

    def whole(*given: Any) -> Loss:
        return replace(algorithm.loss(*given), via=None)

    own, metrics, count = trained(algorithm, batch, algorithm.loss, 4)
    other, others_metrics, others_count = trained(algorithm, batch, whole, 4)
    assert metrics == others_metrics
    for tensor, same in zip(own.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, same)
    assert 0 < count < others_count


def test_a_pass_that_is_not_finite_is_not_left_out() -> None:
    weight = torch.tensor(1.0, requires_grad=True)
    via = weight * math.inf
    take_back(via * 0.0, via)
    assert weight.grad is not None and weight.grad.isnan()


def test_an_update_of_no_advantage_at_all_is_refused_by_nothing() -> None:
    algorithm = ALGORITHMS["ddpo"]
    batch = batch_of(algorithm, idle=8)
    own, metrics, count = trained(algorithm, batch, algorithm.loss, 1)
    assert count == 0 and metrics["grad_norm"] == 0.0 and own.version == 1
