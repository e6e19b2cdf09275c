"""What an algorithm refuses before the first round: nothing to learn from, or a loss that is not
defined there."""

from __future__ import annotations

import pytest

from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import Algorithm, Given
from rlalign.algorithms.d3po import D3PO
from rlalign.algorithms.ddpo import DDPO
from rlalign.algorithms.diffusion_dpo import DiffusionDPO
from rlalign.algorithms.diffusion_nft import DiffusionNFT
from rlalign.algorithms.dpok import DPOK
from rlalign.algorithms.grpo import GRPO
from rlalign.algorithms.reinforce import Reinforce
from rlalign.algorithms.rwr import RWR
from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.diffusion.paths import VariancePreserving
from tests.algorithms.helpers import FlowToy
from tests.toy import ToyPolicy, collect, make_units

SDE = Plan(steps=5, rule="flow_sde", eta=0.7)


def given(
    plan: Plan | None = None, *, per_unit: int = 8, count: int = 2, flow: bool = False
) -> Given:
    """Units of eight samples hold two of each of four prompts; of four, one."""
    plan = plan or (SDE if flow else Plan(steps=5))
    units = make_units(count, per_unit=per_unit, plan=plan)
    return Given(policy=FlowToy() if flow else ToyPolicy(), plan=plan, units=units)


def refused(algorithm: Algorithm, given: Given) -> str:
    with pytest.raises(UserError) as caught:
        algorithm.check(given)
    return str(caught.value)


EVERY = [
    Reinforce(),
    DDPO(),
    DDPO(advantage="group"),
    DPOK(),
    GRPO(),
    D3PO(),
    RWR(),
    DiffusionNFT(),
    DiffusionDPO(),
]


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("algorithm", EVERY, ids=lambda a: a.name)
def test_what_can_learn_passes(algorithm: Algorithm, flow: bool) -> None:
    algorithm.check(given(flow=flow))


# final steps that are left out


@pytest.mark.parametrize(
    ("algorithm", "plan", "expected"),
    [
        (GRPO(), Plan(steps=1), "algorithm.skip_last must be <= 0 with 1 steps, got 1: "),
        (
            GRPO(skip_last=5),
            Plan(steps=5),
            "algorithm.skip_last must be <= 4 with 5 steps, got 5: ",
        ),
        (
            DDPO(skip_last=9),
            Plan(steps=5),
            "algorithm.skip_last must be <= 4 with 5 steps, got 9: ",
        ),
        (
            GRPO(skip_last=6),
            Plan(steps=8, window=2),
            "algorithm.skip_last must be <= 5 with 8 steps and a window of 2, got 6: ",
        ),
    ],
)
def test_a_round_must_keep_a_step_to_learn_from(
    algorithm: Algorithm, plan: Plan, expected: str
) -> None:
    message = refused(algorithm, given(plan))
    assert message.startswith(expected)
    assert message.endswith(
        "a round would have no step to learn from; lower it, or raise plan.steps"
    )


@pytest.mark.parametrize("plan", [Plan(steps=5), Plan(steps=8, window=2), Plan(steps=1)])
def test_the_largest_skip_leaves_one_step_in_every_round(plan: Plan) -> None:
    """The named limit is the last that learns: as many as it gives a pass wherever the window is,
    one more gives some none."""
    most = {5: 4, 8: 5, 1: 0}[plan.steps]
    GRPO(skip_last=most).check(given(plan))
    rounds = [
        collect(ToyPolicy(), make_units(1, per_unit=2, plan=plan, round=r)) for r in range(20)
    ]
    for skip, least in ((most, 1), (most + 1, 0)):
        passes = [
            list(GRPO(skip_last=skip).make_batch(scored, Memory()).passes(1)) for scored in rounds
        ]
        assert min(len(p) for p in passes) == least


# steps without a density


@pytest.mark.parametrize(
    "algorithm", [Reinforce(), DDPO(), DPOK(), GRPO(), D3PO()], ids=lambda a: a.name
)
def test_steps_must_have_a_density(algorithm: Algorithm) -> None:
    name = algorithm.name
    assert refused(algorithm, given(Plan(steps=5, eta=0.0))).startswith(
        f"plan.eta must be > 0 for {name}, got 0.0: no"
    )
    ode = refused(algorithm, given(Plan(steps=5, rule="flow_ode"), flow=True))
    assert (
        ode
        == f"plan.rule must have noise for {name}, got 'flow_ode', whose steps have no density; use"
        " flow_sde"
    )
    last = given(Plan(steps=5, window=1, window_place="end"))
    last.policy.family.path = VariancePreserving.scaled_linear(ends_clean=True)
    assert refused(algorithm, last).startswith(
        f"plan.window must be > 1 for {name} with window_place end, got 1: a round may have no"
    )
    one = given(Plan(steps=1))
    one.policy.family.path = VariancePreserving.scaled_linear(ends_clean=True)
    assert refused(algorithm, one).startswith(
        f"plan.steps must be >= 2 for {name}, got 1: the step to the clean sample"
    )


@pytest.mark.parametrize("algorithm", [RWR(), DiffusionNFT(), DiffusionDPO()], ids=lambda a: a.name)
def test_whoever_needs_none_takes_the_ode(algorithm: Algorithm) -> None:
    algorithm.check(given(Plan(steps=5, eta=0.0)))


# lone samples

COMPARE = [
    GRPO(),
    DDPO(advantage="group"),
    DPOK(),
    D3PO(),
    DiffusionDPO(),
    DiffusionNFT(),
    RWR(over="prompt"),
]


@pytest.mark.parametrize("algorithm", COMPARE, ids=lambda a: a.name)
def test_a_lone_sample_has_nothing_to_be_compared_with(algorithm: Algorithm) -> None:
    message = refused(algorithm, given(per_unit=4, count=1))
    assert message.startswith(
        f"prompts.samples_per_prompt must be >= 2 for {algorithm.name}, which compares"
    )
    assert ", got 1; or take an algorithm that needs no company" in message


@pytest.mark.parametrize(
    "algorithm", [Reinforce(), DDPO(), DDPO(advantage="global"), RWR()], ids=lambda a: a.name
)
def test_whoever_compares_over_the_round_takes_lone_samples(algorithm: Algorithm) -> None:
    algorithm.check(given(per_unit=4, count=1))


def test_a_prompt_that_is_drawn_twice_has_company_where_it_is_compared() -> None:
    """Four prompts once in each of two units: a group of the round, but no pair of a unit."""
    twice = given(per_unit=4, count=2)
    GRPO().check(twice)
    assert "samples_per_prompt" in refused(D3PO(), twice)


def test_a_given_set_of_pairs_needs_no_samples() -> None:
    DiffusionDPO().check(Given(policy=ToyPolicy(), plan=Plan(), ties="drop"))


# what a loss is not defined for


def test_diffusion_nft_takes_no_guidance() -> None:
    message = refused(DiffusionNFT(), given(Plan(steps=5, eta=0.0, guidance=3.0)))
    assert message.startswith(
        "plan.guidance must be <= 1 for diffusion_nft, whose loss compares unguided predictions,"
        " got 3: "
    )


def test_ties_of_a_set_are_said_in_one_place() -> None:
    """algorithm.ties half beside a set that drops its ties is an error; half on both sides, or the
    default, is not."""
    offline = {ties: Given(policy=ToyPolicy(), plan=Plan(), ties=ties) for ties in ("drop", "half")}
    message = refused(DiffusionDPO(ties="half"), offline["drop"])
    assert message.startswith("algorithm.ties must be drop where the pairs are a set's, got 'half'")
    assert message.endswith("set preferences.ties to half")
    DiffusionDPO(ties="half").check(offline["half"])
    for one in (*offline.values(), given()):
        DiffusionDPO().check(one)
    DiffusionDPO(ties="half").check(given())
