"""Which guards a run file may have, and that those of before are what they were."""

from __future__ import annotations

import pytest

from rlalign.config import identity_of
from tests.config.test_config import least, refused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["guard={kl_most: 0.1, action: raise_kl}"],
            "guard.action raise_kl needs an algorithm with a kl_weight > 0 (dpok, grpo,"
            " diffusion_nft, reward_backprop), and ddpo has none; set one, or take halve or stop",
        ),
        (
            ["guard={kl_most: 0.1, action: raise_kl}", "algorithm={name: grpo}"],
            "guard.action raise_kl needs an algorithm with a kl_weight > 0 (dpok, grpo,"
            " diffusion_nft, reward_backprop), and grpo has none; set one, or take halve or stop",
        ),
        (
            ["guard={kl_most: 0.1}", "plan.eta=0", "algorithm={name: rwr}"],
            "guard.kl_most needs steps with noise, whose KL it is, got plan.eta 0; watch a held-out"
            " reward or the diversity",
        ),
    ],
)
def test_a_guard_that_could_not_act_is_refused(overrides, said):
    assert refused(*overrides) == said


def test_rules_that_are_not_asked_for_change_no_identity():
    plain = least("guard={held_out: bytes}", "evaluate.rewards=[{name: jpeg, label: bytes}]")
    same = least(
        "guard={held_out: bytes, kl_most: 0, diversity_least: 0}",
        "evaluate.rewards=[{name: jpeg, label: bytes}]",
    )
    assert identity_of(same) == identity_of(plain)
    assert identity_of(least("guard={kl_most: 0.1}")) != identity_of(least())
