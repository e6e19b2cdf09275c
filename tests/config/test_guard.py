"""Which guards a run file may have, and that those of before are what they were."""

from __future__ import annotations

import pytest

from rlalign.config import identity_of
from tests.config.test_config import least, refused


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["guard={limits: [{name: kl, most: 0.1}], action: raise_kl}"],
            "guard.action raise_kl needs an algorithm with a kl_weight > 0 (dpok, grpo,"
            " diffusion_nft, reward_backprop), and ddpo has none; set one, or take halve or stop",
        ),
        (
            ["guard={limits: [{name: kl, most: 0.1}], action: raise_kl}", "algorithm={name: grpo}"],
            "guard.action raise_kl needs an algorithm with a kl_weight > 0 (dpok, grpo,"
            " diffusion_nft, reward_backprop), and grpo has none; set one, or take halve or stop",
        ),
        (
            ["guard={limits: [{name: kl, most: 0.1}]}", "plan.eta=0", "algorithm={name: rwr}"],
            "guard.limits.0: kl needs steps with noise, whose KL it is, got plan.eta 0; watch a"
            " held-out reward or the diversity",
        ),
        (
            ["guard={limits: [{name: kl}]}"],
            "guard.limits.0.most is required",
        ),
        (
            ["guard={limits: [{name: klm}]}"],
            "guard.limits.0.name: no plug-in 'klm' on shelf limits; did you mean 'kl'?",
        ),
        (
            ["guard={limits: 0.1}"],
            "guard.limits must be a list of limits such as [{name: kl, most: 0.01}], got 0.1",
        ),
    ],
)
def test_a_guard_that_could_not_act_is_refused(overrides, said):
    assert refused(*overrides) == said


MEASURED = "evaluate.rewards=[{name: jpeg, label: bytes}]"
GUARDS_OF_BEFORE = {
    "{patience: 2}": "2c450905599e9435",
    "{held_out: bytes}": "87668410ce317125",
    "{held_out: bytes, drop: 0.1, kl_most: 0.2, diversity_least: 0.5}": "70dd203bbef43eef",
    "{kl_most: 0.2, action: halve}": "47f625e30f2581dd",
}
"""A guard in the spelling of rlalign 0.1 -> the identity that it gave the run."""
EVERY = (
    "{limits: [{name: held_out, reward: bytes, drop: 0.1}, {name: kl, most: 0.2},"
    " {name: diversity, least: 0.5}]}"
)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("{held_out: '', drop: 0.05, kl_most: 0, diversity_least: 0}", "{limits: []}"),
        ("{held_out: bytes}", "{limits: [{name: held_out, reward: bytes}]}"),
        ("{held_out: bytes, drop: 0.1, kl_most: 0.2, diversity_least: 0.5}", EVERY),
        ("{kl_most: 0.2, patience: 3}", "{limits: [{name: kl, most: 0.2}], patience: 3}"),
    ],
)
def test_the_keys_of_before_are_limits(before, now):
    assert least(f"guard={before}", MEASURED).guard == least(f"guard={now}", MEASURED).guard


def test_a_key_of_before_changes_the_limit_that_there_is():
    found = least(f"guard={EVERY}", "guard.drop=0.3", "guard.kl_most=0", MEASURED).guard
    expected = [("held_out", 0.3), ("diversity", None)]
    assert [(one.name, getattr(one, "drop", None)) for one in found.limits] == expected


def test_identities_of_before_hold():
    given = [least(f"guard={guard}", MEASURED) for guard in GUARDS_OF_BEFORE]
    assert [identity_of(run) for run in given] == list(GUARDS_OF_BEFORE.values())


def test_what_could_not_be_said_before_has_an_identity_of_its_own():
    twice = "{limits: [{name: kl, most: 0.2}, {name: kl, most: 0.3}]}"
    once = "{limits: [{name: kl, most: 0.2}]}"
    first, second, none = (
        identity_of(least(f"guard={guard}")) for guard in (once, twice, "{limits: []}")
    )
    assert len({first, second, none}) == 3
