"""DDPO's proximal form: the ratio is taken to the weights that start a round's updates, the weight
to those that sampled."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch

from rlalign.algorithms.base import step_batch
from rlalign.algorithms.ddpo import DDPO
from rlalign.core.batches import StepPass
from rlalign.diffusion.rollout import replay_log_prob
from rlalign.policies.base import Policy
from tests.toy import PLAN, ToyPolicy, as_float64, collect, gradient, make_units

C = 0.5
PROXIMAL = DDPO(advantage="global", clip_range=C, proximal=True)
PLAIN = DDPO(advantage="global", clip_range=C)


def log_probs(policy: Policy, one: StepPass) -> torch.Tensor:
    condition = policy.encode(one.unit.prompts).rows(len(one.steps))
    return replay_log_prob(policy, one.unit, one.before_BS, one.after_BS, one.steps, condition)[0]


def scene(move: float) -> tuple[ToyPolicy, StepPass]:
    """Samples of one policy, the proximal snapshot ``move`` away from it, and the current weights
    another ``move`` away."""
    policy = ToyPolicy(dtype=torch.float64)
    batch = as_float64(
        step_batch(collect(policy, make_units(1, per_unit=4)), np.array([1.0, -1.0, 2.0, -0.5]))
    )
    one = next(batch.passes(PLAN.steps))
    one = replace(one, log_prob_BS=log_probs(policy, one).detach())
    rng = torch.Generator().manual_seed(3)

    def moved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            n: w + move * torch.randn(w.shape, generator=rng, dtype=w.dtype)
            for n, w in weights.items()
        }

    proximal = moved(policy.weights())
    policy.snapshots = MappingProxyType({"proximal": proximal})
    policy.set_weights(moved(proximal))
    return policy, one


def test_the_loss_is_weight_times_surrogate_written_out() -> None:
    policy, one = scene(0.05)
    mine = log_probs(policy, one)
    with policy.as_snapshot("proximal"):
        theirs = log_probs(policy, one).detach()
    advantage = one.advantage_B[:, None]
    r, w = (mine - theirs).exp(), (theirs - one.log_prob_BS).exp()
    wanted = (w * torch.maximum(-advantage * r, -advantage * r.clamp(1 - C, 1 + C))).mean()
    found = PROXIMAL.loss(one, policy)
    assert torch.allclose(found.value, wanted, rtol=0, atol=1e-12)
    assert torch.allclose(
        gradient(found.value, policy), gradient(wanted, policy), rtol=0, atol=1e-12
    )
    assert found.maxima["ratio/behaviour_deviation"].item() == pytest.approx(
        (w - 1).abs().max().item()
    )


def test_unclipped_it_is_the_plain_form() -> None:
    """w r is the whole ratio: nothing differs but what is clipped."""
    policy, one = scene(0.001)
    found, wanted = PROXIMAL.loss(one, policy), PLAIN.loss(one, policy)
    assert (
        found.means["ratio/clip_fraction"].item()
        == wanted.means["ratio/clip_fraction"].item()
        == 0.0
    )
    assert torch.allclose(
        gradient(found.value, policy), gradient(wanted.value, policy), rtol=0, atol=1e-12
    )


def test_stale_samples_are_not_clipped_before_the_first_update() -> None:
    """Current weights equal to the proximal ones: ratio exactly 1, where the plain form has clipped
    nearly everything."""
    policy, one = scene(0.05)
    policy.set_weights(dict(policy.snapshots["proximal"]))
    narrow = 1e-4
    found = PROXIMAL.model_copy(update={"clip_range": narrow}).loss(one, policy)
    plain = PLAIN.model_copy(update={"clip_range": narrow}).loss(one, policy)
    assert found.maxima["ratio/max_deviation"].item() == 0.0
    assert found.means["ratio/clip_fraction"].item() == 0.0
    assert plain.means["ratio/clip_fraction"].item() > 0.9
    assert gradient(found.value, policy).abs().max() > 0


def test_the_score_function_has_no_ratio_to_take_apart() -> None:
    with pytest.raises(ValueError, match="proximal belongs to the form importance_sampling"):
        DDPO(form="score_function", proximal=True)
