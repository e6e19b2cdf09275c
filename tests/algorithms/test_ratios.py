"""Before the first update every ratio is 1, for every ratio-based algorithm: exactly in float32, on
both shipped models too.

In bfloat16, in which the denoiser alone computes, it keeps to a tenth of the clip range, which is
what a run insists on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import Algorithm
from rlalign.algorithms.d3po import D3PO
from rlalign.algorithms.ddpo import DDPO
from rlalign.algorithms.dpok import DPOK
from rlalign.algorithms.grpo import GRPO
from rlalign.core.records import Plan, Scored
from rlalign.core.registry import UserError, build
from rlalign.diffusion.noise import noisy_steps
from rlalign.policies.base import Policy, PolicyRecipe, Words
from tests.algorithms.helpers import FlowToy, scored_of
from tests.runs import small_run
from tests.toy import ToyFamily, ToyPolicy, collect, make_units

ALGORITHMS = {
    "ddpo": DDPO(),
    "dpok": DPOK(kl_weight=0.1),
    "grpo": GRPO(kl_weight=0.1),
    "grpo-guard": GRPO(guard=True),
    "grpo, detached": GRPO(kl_weight=0.1, detach_uncond=True),
}
PLANS = {
    "vp": (ToyPolicy, Plan(steps=6, eta=1.0)),
    "vp guided": (ToyPolicy, Plan(steps=6, eta=1.0, guidance=3.0)),
    "flow sde": (FlowToy, Plan(steps=6, rule="flow_sde", eta=0.7)),
    "flow sde guided": (FlowToy, Plan(steps=6, rule="flow_sde", eta=0.7, guidance=4.5)),
    "flow window": (FlowToy, Plan(steps=8, rule="flow_sde", eta=0.7, window=2)),
    "end, least std": (ToyPolicy, Plan(steps=5, window=2, window_place="end", min_std=0.1)),
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


SHIPPED = {
    "tiny": Plan(steps=3, eta=1.0),
    "tiny_flow": Plan(steps=3, rule="flow_sde", eta=0.7),
}
ON_SHIPPED = {
    **ALGORITHMS,
    "ddpo, proximal": DDPO(proximal=True),
    "dpok, clipped surrogate": DPOK(clip="surrogate", kl_form="noise"),
    "grpo, all steps": GRPO(skip_last=0, kl_weight=0.1, kl_form="coded"),
}


@cache
def shipped(name: str, precision: str) -> tuple[Policy, Sequence[Scored]]:
    """A shipped model and eight samples of it: four prompts, twice each."""
    more = {"t5_tokens": 0} if name == "tiny_flow" else {}  # a fifth of the time
    policy = build("policies", {"name": name, "precision": precision, **more}).load("cpu")  # type: ignore[attr-defined]
    return policy, collect(policy, make_units(1, per_unit=8, plan=SHIPPED[name]))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", SHIPPED)
@pytest.mark.parametrize("algorithm", ON_SHIPPED.values(), ids=list(ON_SHIPPED))
def test_the_ratio_is_one_on_the_shipped_models(
    algorithm: Algorithm, model: str, precision: str
) -> None:
    policy, scored = shipped(model, precision)
    policy.snapshots = {"proximal": policy.weights()}
    assert algorithm.ratio_limit(1) is not None
    passes = list(algorithm.make_batch(scored, Memory()).passes(1))
    assert passes
    for one in passes:
        found = algorithm.loss(one, policy).maxima["ratio/max_deviation"].item()
        assert found == 0.0 if precision == "float32" else found <= algorithm.ratio_limit(1)


@pytest.mark.parametrize("model", SHIPPED)
def test_d3pos_ratios_to_the_reference_are_one_before_the_first_update(model: str) -> None:
    """They are to the pretrained policy, which the policy is until then; the behaviour policy
    appears nowhere."""
    policy, scored = shipped(model, "float32")
    assert D3PO().ratio_limit(1) is None
    losses = [D3PO().loss(one, policy) for one in D3PO().make_batch(scored, Memory()).passes(1)]
    assert losses and all(
        loss.maxima["reference_ratio/max_deviation"].item() == 0.0 for loss in losses
    )


class DriftingFamily(ToyFamily):
    """Answers ``by`` more where gradients are wanted."""

    by: float

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        plain = super().predict(x, timestep_B, words)
        return plain + (self.by if torch.is_grad_enabled() else 0.0)


class Drifting(PolicyRecipe):
    """The toy policy, which computes something else where gradients are wanted. Source: none, a
    test's own."""

    by: float = 0.0

    family = DriftingFamily

    def build(self, device: str) -> DriftingFamily:
        family = DriftingFamily()
        family.by = self.by
        return family


def drifting(by: float, folder: Path, *more: str) -> None:
    from rlalign.alignment.loop import train_local

    policy = f"policy={{name: 'tests.algorithms.test_ratios:Drifting', by: {by}}}"
    settings = (
        "rewards=[{name: jpeg}]",
        "rounds=1",
        "learner.shards=1",
        "runtime.rollout.workers=1",
    )
    train_local(small_run(policy, *settings, *more), folder, resume=False, on_record=lambda _: None)


def test_a_run_refuses_to_learn_where_its_samples_replay_to_other_numbers(tmp_path: Path) -> None:
    drifting(0.0, tmp_path / "same")
    with pytest.raises(
        UserError,
        match=(
            r"max\|ratio - 1\| before the first update must be <= 0\.0001 \(a tenth of the clip"
            r" range\), got 0\.\d+; give"
        ),
    ):
        drifting(0.01, tmp_path / "other")
    assert not (tmp_path / "other" / "checkpoints").exists()


@pytest.mark.usefixtures("without_report")
def test_a_run_that_replays_is_held_to_it_in_its_first_round_alone(tmp_path: Path) -> None:
    """From the second round on the batch holds steps of an earlier policy, whose ratios are rightly
    not 1."""
    replays = "algorithm={name: dpok, replay: 1, clip_range: 1.0e-5}"
    drifting(0.0, tmp_path / "same", replays, "rounds=3", "learner.lr=1e-2")
    with pytest.raises(UserError, match=r"before the first update must be <= 1e-06"):
        drifting(0.01, tmp_path / "other", replays)


def test_a_window_is_noisy_where_it_says_and_learned_from_alone() -> None:
    """Two of eight steps, in the first half, the same for all units of a round; the others are the
    ODE's and carry no loss."""
    plan = Plan(steps=8, rule="flow_sde", eta=0.7, window=2)
    starts = set()
    for scored in (scored_of(FlowToy(), plan, count=3, per_unit=2),):
        masks = [s.trajectory.stochastic_K.tolist() for s in scored if s.trajectory is not None]
        assert all(mask == noisy_steps(scored[0].unit) == masks[0] for mask in masks)
        assert sum(masks[0]) == 2
        assert not any(masks[0][4:])
        starts.add(masks[0].index(True))
        steps = [p.steps for p in GRPO(skip_last=0).make_batch(scored, Memory()).passes(1)]
        assert {k for chosen in steps for k in chosen} == {
            k for k, noisy in enumerate(masks[0]) if noisy
        }
    from dataclasses import replace

    unit = scored[0].unit
    found = {tuple(noisy_steps(replace(unit, key=unit.key._replace(round=r)))) for r in range(40)}
    assert len(found) == 3, "two of the first four: three places to start, and 40 rounds meet all"
