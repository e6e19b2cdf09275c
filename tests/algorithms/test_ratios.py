"""O19: before the first update every ratio is exactly 1, for every ratio-based algorithm, on both paths, in float32."""

from __future__ import annotations

import pytest
import torch

from rlalign.algorithms.base import Algorithm
from rlalign.algorithms.ddpo import DDPO
from rlalign.algorithms.dpok import DPOK
from rlalign.algorithms.grpo import GRPO
from rlalign.diffusion.noise import noisy_steps
from rlalign.memory import Memory
from rlalign.records import Plan
from tests.algorithms.helpers import FlowToy, scored_of
from tests.toy import ToyPolicy

ALGORITHMS = {
    "ddpo": DDPO(),
    "dpok": DPOK(kl_weight=0.1),
    "grpo": GRPO(kl_weight=0.1),
    "grpo-guard": GRPO(guard=True),
}
PLANS = {
    "vp": (ToyPolicy, Plan(steps=6, eta=1.0)),
    "vp guided": (ToyPolicy, Plan(steps=6, eta=1.0, guidance=3.0)),
    "flow sde": (FlowToy, Plan(steps=6, rule="flow_sde", eta=0.7)),
    "flow window": (FlowToy, Plan(steps=8, rule="flow_sde", eta=0.7, window=2)),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))
@pytest.mark.parametrize("place", PLANS)
def test_the_ratio_is_exactly_one(algorithm: Algorithm, place: str) -> None:
    make, plan = PLANS[place]
    policy = make()
    batch = algorithm.make_batch(scored_of(policy, plan), Memory())
    passes = list(batch.passes(1))
    assert passes
    for one in passes:
        loss = algorithm.loss(one, policy)
        assert loss.maxima["ratio/max_deviation"].item() == 0.0
        assert loss.means["ratio/mean"].item() == 1.0
        assert torch.isfinite(loss.value)


def test_a_window_is_noisy_where_it_says_and_learned_from_alone() -> None:
    """Two of eight steps, in the first half, the same for all units of a round; the others are the ODE's and carry no loss."""
    plan = Plan(steps=8, rule="flow_sde", eta=0.7, window=2)
    starts = set()
    for scored in (scored_of(FlowToy(), plan, count=3, per_unit=2),):
        masks = [s.trajectory.stochastic_K.tolist() for s in scored if s.trajectory is not None]
        assert all(mask == noisy_steps(scored[0].unit) == masks[0] for mask in masks)
        assert sum(masks[0]) == 2
        assert not any(masks[0][4:])
        starts.add(masks[0].index(True))
        steps = [p.steps for p in GRPO(skip_last=0).make_batch(scored, Memory()).passes(1)]
        assert {k for chosen in steps for k in chosen} == {k for k, noisy in enumerate(masks[0]) if noisy}
    from dataclasses import replace

    unit = scored[0].unit
    found = {tuple(noisy_steps(replace(unit, key=unit.key._replace(round=r)))) for r in range(40)}
    assert len(found) == 3, "two of the first four: three places to start, and 40 rounds meet all"
