"""``refresh_every``: through the learner, the reference is the weights after the last round that k
divides, and nothing else."""

from __future__ import annotations

import pytest
import torch

from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import Algorithm
from rlalign.algorithms.d3po import D3PO
from rlalign.algorithms.diffusion_dpo import DiffusionDPO
from rlalign.learning.learner import Learner
from rlalign.learning.settings import LearnerSettings
from rlalign.policies.base import Policy
from tests.toy import ToyPolicy, collect, make_units


def learner_of(algorithm: Algorithm, *, lora_rank: int = 0) -> Learner:
    policy = ToyPolicy(lora_rank=lora_rank)
    settings = LearnerSettings(lr=1e-2)
    return Learner(policy, algorithm.loss, settings, seed=0, copies=algorithm.copies)


def said_as_reference(policy: Policy, *, pretrained: bool = False) -> torch.Tensor:
    """What the policy predicts where it is the reference."""
    x, level = torch.linspace(-1, 1, 4).reshape(2, 2, 1, 1), policy.path.levels(5)[1]
    with torch.no_grad(), policy.as_reference(pretrained=pretrained):
        return policy.denoise(x, level, policy.encode(("a red circle", "a blue square")), 1.0)[1]


def said(policy: Policy) -> torch.Tensor:
    x, level = torch.linspace(-1, 1, 4).reshape(2, 2, 1, 1), policy.path.levels(5)[1]
    with torch.no_grad():
        return policy.denoise(x, level, policy.encode(("a red circle", "a blue square")), 1.0)[1]


def round_of(learner: Learner, algorithm: Algorithm, round: int) -> None:
    scored = collect(learner.policy, make_units(2, per_unit=8, round=round))
    learner.update(algorithm.make_batch(scored, Memory()), round=round)


@pytest.mark.promise
@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("every", [0, 1, 2, 3])
@pytest.mark.parametrize("make", [D3PO, DiffusionDPO], ids=lambda m: m.__name__)
def test_the_reference_is_the_policy_of_the_last_multiple_of_k(
    make: type[D3PO] | type[DiffusionDPO], every: int, lora_rank: int
) -> None:
    """Seven rounds, bit for bit; with LoRA too, where the pretrained reference is the adapter
    switched off."""
    algorithm = make(beta=5.0, refresh_every=every)
    learner = learner_of(algorithm, lora_rank=lora_rank)
    pretrained = after = said(learner.policy)
    for round in range(1, 8):
        assert torch.equal(said_as_reference(learner.policy), after)
        round_of(learner, algorithm, round)
        moved = said(learner.policy)
        assert not torch.equal(moved, after), "the round has learned something"
        if every and round % every == 0:
            after = moved
        assert torch.equal(said_as_reference(learner.policy), after)
        assert torch.equal(said_as_reference(learner.policy, pretrained=True), pretrained)
        assert torch.equal(said(learner.policy), moved), "and asking the reference moves nothing"
    assert torch.equal(after, pretrained) is (every == 0)


def test_the_refreshed_reference_is_the_losss() -> None:
    """After a refresh the loss of fresh pairs is ln 2 again; without one it is not."""
    found = {}
    for every in (0, 1):
        algorithm = DiffusionDPO(beta=500.0, refresh_every=every, caption_dropout=0.0)
        learner = learner_of(algorithm)
        round_of(learner, algorithm, 1)
        scored = collect(learner.policy, make_units(1, per_unit=8, round=2))
        one = next(iter(algorithm.make_batch(scored, Memory()).passes(1)))
        found[every] = algorithm.loss(one, learner.policy).value.item()
    assert found[1] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(found[0] - 0.6931472) > 1e-3
