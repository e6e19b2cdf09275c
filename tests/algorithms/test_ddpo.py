"""DDPO: its gradient against the closed form of a linear-Gaussian chain, and the invariants of its
ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import step_batch
from rlalign.algorithms.ddpo import DDPO
from rlalign.core.batches import StepBatch, StepPass
from rlalign.core.records import Plan, Scored, Unit
from rlalign.core.registry import UserError, build
from rlalign.diffusion.paths import VariancePreserving
from rlalign.diffusion.rollout import replay_log_prob
from rlalign.diffusion.steps import step
from rlalign.policies.base import OWN_SIZE, Condition, Family, Policy, Words
from tests.toy import PLAN, ToyPolicy, as_float64, collect, first_number, gradient, make_units

SCORE_FUNCTION = DDPO(form="score_function", advantage="global")
IMPORTANCE = DDPO(form="importance_sampling", advantage="global")

A_K = (0.9, 0.8, 0.95, 0.7, 0.85)
CLOSED_FORM_K = (0.452200, 0.565250, 0.595000, 0.85, 1.0)
"""dE[x_0] / db_k = product of the later a."""


class Biases(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias_K = torch.nn.Parameter(torch.tensor([0.1, -0.2, 0.3, 0.05, -0.1]))


class ChainFamily(Family):
    """x_next = a_k x + b_k + s_k z with learnable b: a denoiser whose DDPM posterior mean is that
    line, exactly.

    The path has six levels; the network's output is the clean sample that makes the posterior's
    mean a_k x + b_k.
    """

    prediction = "sample"
    device = "cpu"

    def __init__(self) -> None:
        self.path = VariancePreserving(
            [0.9, 0.75, 0.6, 0.45, 0.3, 0.15], spacing="leading", offset=1
        )
        self.network = Biases()

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        empty = torch.zeros(len(prompts), 1, 1)
        words = Words({"embeds_BLD": empty})
        return Condition(caption=words, empty=words)

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        k_B = 5 - timestep_B  # levels 5, 4, 3, 2, 1
        a_B = torch.tensor(A_K)[k_B].reshape(-1, 1, 1, 1)
        wanted = a_B * x + self.network.bias_K[k_B].reshape(-1, 1, 1, 1)
        ones, zeros, level = torch.ones_like(x), torch.zeros_like(x), timestep_B.double()
        of_clean = step(zeros, ones, zeros, self.path, level, level - 1, rule="ddpm", eta=1.0).mean
        of_x = step(ones, zeros, zeros, self.path, level, level - 1, rule="ddpm", eta=1.0).mean
        return (wanted - of_x * x) / of_clean

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(latents)[:, None].expand(-1, 1, 3, 1, 1)

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        return torch.logit(media_BFCHW[:, 0, :1])

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        return (1, 1, 1)

    def save(self, folder: Path) -> None:
        raise NotImplementedError


class ChainPolicy(Policy):
    """The chain's policy."""

    plan = Plan(steps=5, rule="ddpm", eta=1.0)
    kind: ClassVar[type[ChainFamily]] = ChainFamily

    def __init__(self) -> None:
        super().__init__(self.kind())


UNITS, PER_UNIT = 32, 256


@pytest.fixture(scope="module")
def chain() -> tuple[ChainPolicy, list[Scored]]:
    """8 192 samples of the chain, seed 0."""
    policy = ChainPolicy()
    return policy, collect(policy, make_units(UNITS, per_unit=PER_UNIT, plan=policy.plan, seed=0))


def estimates(policy: Policy, batch: StepBatch, algorithm: DDPO) -> np.ndarray:
    """(units, K) one estimate per unit of dE[r] / db: minus the loss's gradient, times K for the
    mean over steps."""
    rows = []
    for i in range(len(batch.units)):
        part = batch.pick([i])
        total = sum(algorithm.loss(p, policy).value * p.weight for p in part.passes(len(A_K)))
        assert isinstance(total, torch.Tensor)
        rows.append(-len(A_K) * gradient(total, policy).numpy())
    return np.stack(rows)


def test_chain_steps_are_the_affine_ones(chain: tuple[ChainPolicy, list[Scored]]) -> None:
    """What was rolled out has E[x_0] of the closed form (8 192 samples, 4 standard errors)."""
    policy, scored = chain
    mean = 0.0
    for a, b in zip(A_K, policy.network.bias_K.tolist(), strict=True):
        mean = a * mean + b
    reward_B = np.concatenate([s.total_B for s in scored])
    assert reward_B.mean() == pytest.approx(mean, abs=4 * reward_B.std() / np.sqrt(len(reward_B)))
    assert all(s.trajectory is not None and s.trajectory.stochastic_K.all() for s in scored)


@pytest.mark.parametrize("algorithm", [SCORE_FUNCTION, IMPORTANCE], ids=lambda a: a.form)
def test_policy_gradient_converges_to_the_closed_form(
    chain: tuple[ChainPolicy, list[Scored]], algorithm: DDPO
) -> None:
    """8 192 samples, seed 0: within 4 standard errors of every partial derivative, each below
    0.05."""
    policy, scored = chain
    reward_B = np.concatenate([s.total_B for s in scored])
    per_unit = estimates(policy, step_batch(scored, reward_B), algorithm)
    error_K = per_unit.std(0, ddof=1) / np.sqrt(UNITS)
    assert error_K.max() < 0.05
    assert np.all(np.abs(per_unit.mean(0) - CLOSED_FORM_K) < 4 * error_K)


def test_a_baseline_moves_no_mean_and_the_mean_reward_lowers_the_variance(
    chain: tuple[ChainPolicy, list[Scored]],
) -> None:
    """Rewards lifted by 3: baseline 0 against baseline mean(r). The difference is within 4 of its
    standard errors."""
    policy, scored = chain
    reward_B = np.concatenate([s.total_B for s in scored]) + 3.0
    without = estimates(policy, step_batch(scored, reward_B), SCORE_FUNCTION)
    with_mean = estimates(policy, step_batch(scored, reward_B - reward_B.mean()), SCORE_FUNCTION)
    gap = without - with_mean
    assert np.all(np.abs(gap.mean(0)) < 4 * gap.std(0, ddof=1) / np.sqrt(UNITS))
    assert np.all(with_mean.var(0) < 0.5 * without.var(0))
    error_K = with_mean.std(0, ddof=1) / np.sqrt(UNITS)
    assert np.all(np.abs(with_mean.mean(0) - CLOSED_FORM_K) < 4 * error_K)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_importance_sampling_equals_score_function_before_the_first_update(guidance: float) -> None:
    """float64, 1e-12: the ratio is 1 up to rounding and the two gradients agree."""
    policy = ToyPolicy(dtype=torch.float64)
    scored = collect(policy, make_units(2, plan=Plan(steps=5, guidance=guidance)))
    batch = as_float64(IMPORTANCE.make_batch(scored, Memory()))
    for one in batch.passes(PLAN.steps):
        # behaviour log-probs again, in this precision
        on_policy = replace(one, log_prob_BS=log_probs(policy, one))
        wanted = gradient(SCORE_FUNCTION.loss(on_policy, policy).value, policy)
        found = gradient(IMPORTANCE.loss(on_policy, policy).value, policy)
        assert wanted.abs().max() > 1e-3
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def log_probs(policy: Policy, one: StepPass) -> torch.Tensor:
    condition = policy.encode(one.unit.prompts).rows(len(one.steps))
    return replay_log_prob(policy, one.unit, one.before_BS, one.after_BS, one.steps, condition)[
        0
    ].detach()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ratio_is_exactly_one_before_the_first_update(guidance: float) -> None:
    """One step a pass has the rollout's own shape: float32, not a bit apart."""
    policy = ToyPolicy()
    batch = IMPORTANCE.make_batch(
        collect(policy, make_units(4, plan=Plan(steps=5, guidance=guidance))), Memory()
    )
    for one in batch.passes(1):
        loss = IMPORTANCE.loss(one, policy)
        assert loss.maxima["ratio/max_deviation"].item() == 0.0
        assert loss.means["ratio/clip_fraction"].item() == 0.0


def test_several_steps_a_pass_stay_below_a_tenth_of_the_clip_range() -> None:
    policy = ToyPolicy()
    batch = IMPORTANCE.make_batch(collect(policy, make_units(4)), Memory())
    for one in batch.passes(3):
        assert IMPORTANCE.loss(one, policy).maxima[
            "ratio/max_deviation"
        ].item() <= IMPORTANCE.ratio_limit(1)  # type: ignore[operator]


def test_gradient_of_clipped_samples_is_exactly_zero() -> None:
    """Ratios e^{+-0.01} at c = 1e-4: only the samples that may still improve pull, the others not
    by one bit."""
    policy = ToyPolicy()
    (unit,) = make_units(1, per_unit=4)
    batch = step_batch(collect(policy, [unit]), np.ones(4))
    one = next(batch.passes(PLAN.steps))
    shift_B = torch.tensor([0.01, 0.01, -0.01, -0.01])
    advantage_B = torch.tensor([1.0, -1.0, 1.0, -1.0])
    moved = replace(one, log_prob_BS=one.log_prob_BS - shift_B[:, None], advantage_B=advantage_B)
    log_prob_BS = log_probs(policy, moved)
    assert torch.allclose(
        log_prob_BS - moved.log_prob_BS, shift_B[:, None].expand(-1, 5), atol=1e-5
    )
    for sample, clipped in enumerate([True, False, False, True]):
        mask_B = torch.zeros(4)
        mask_B[sample] = 1.0
        alone = replace(moved, advantage_B=advantage_B * mask_B)
        pull = gradient(IMPORTANCE.loss(alone, policy).value, policy)
        assert (pull.abs().max().item() == 0.0) is clipped
    assert IMPORTANCE.loss(moved, policy).means["ratio/clip_fraction"].item() == 1.0


def test_gradient_under_guidance_equals_finite_differences() -> None:
    """Central differences of step 1e-6 in float64 at three weights of the first layer: relative
    1e-5."""
    policy = ToyPolicy(dtype=torch.float64)
    plan = Plan(steps=5, guidance=3.0)
    batch = as_float64(IMPORTANCE.make_batch(collect(policy, make_units(1, plan=plan)), Memory()))
    one = next(batch.passes(5))
    value = SCORE_FUNCTION.loss(one, policy).value
    whole = gradient(value, policy)
    weight = policy.network.inner.weight
    names = list(policy.trainable())
    offset = sum(policy.trainable()[n].numel() for n in names[: names.index("inner.weight")])
    for entry in (0, 9, 37):
        step_size = 1e-6
        with torch.no_grad():
            weight.view(-1)[entry] += step_size
            up = SCORE_FUNCTION.loss(one, policy).value
            weight.view(-1)[entry] -= 2 * step_size
            down = SCORE_FUNCTION.loss(one, policy).value
            weight.view(-1)[entry] += step_size
        assert whole[offset + entry].item() == pytest.approx(
            ((up - down) / (2 * step_size)).item(), rel=1e-5, abs=1e-8
        )


def test_gradient_flows_through_both_halves_of_guidance() -> None:
    """At w = 3 the guided prediction pulls -2 times on the empty caption's half and 3 times on the
    caption's (1e-12)."""
    policy = ToyPolicy(dtype=torch.float64)
    x = torch.randn(2, 2, 1, 1, dtype=torch.float64)
    level = policy.path.levels(5)[0]
    condition = policy.encode(("a red circle", "a blue square"))
    halves = {}
    for name in ("cond", "uncond"):
        only = Condition(
            caption=condition.caption.to(dtype=torch.float64),
            empty=condition.empty.to(dtype=torch.float64),
        )
        leaf = (only.caption if name == "cond" else only.empty)["embeds_BLD"].requires_grad_(True)
        _, noise = policy.denoise(x, level, only, 3.0)
        (halves[name],) = torch.autograd.grad(noise.sum(), leaf)
        alone = leaf.detach().requires_grad_(True)
        t_B = policy.path.timestep(level).expand(2)
        (raw,) = torch.autograd.grad(
            policy.family.predict(x, t_B, Words({"embeds_BLD": alone})).sum(), alone
        )
        assert torch.allclose(halves[name], (3.0 if name == "cond" else -2.0) * raw, rtol=1e-12)
        assert halves[name].abs().max() > 0


def test_a_dropped_sample_has_no_pull() -> None:
    policy = ToyPolicy()
    units = make_units(1, per_unit=4)

    def with_a_hole(final_BCHW: np.ndarray) -> np.ndarray:
        value_B = first_number(final_BCHW).copy()
        value_B[2] = np.nan
        return value_B

    batch = IMPORTANCE.make_batch(collect(policy, units, reward=with_a_hole), Memory())
    assert batch.advantage[0][2].item() == 0.0
    assert torch.isfinite(
        gradient(IMPORTANCE.loss(next(batch.passes(1)), policy).value, policy)
    ).all()


def test_make_batch_clips_and_clones() -> None:
    policy = ToyPolicy()
    scored = collect(
        policy, make_units(2, per_unit=6), reward=lambda x: np.r_[100.0, np.zeros(len(x) - 1)]
    )
    batch = DDPO(advantage="group", advantage_clip=0.5).make_batch(scored, Memory())
    assert max(a.abs().max().item() for a in batch.advantage) == 0.5
    assert scored[0].trajectory is not None
    before = scored[0].trajectory.latents_BK1.copy()
    batch.latents[0].zero_()
    batch.log_prob[0].zero_()
    assert np.array_equal(scored[0].trajectory.latents_BK1, before)


def test_prompt_statistics_are_the_runs_memory() -> None:
    """advantage: prompt takes the round into the statistics; group and global leave them alone."""
    scored = collect(ToyPolicy(), make_units(2, per_unit=4))
    for form, remembered in (("prompt", 4), ("group", 0), ("global", 0)):
        memory = Memory()
        DDPO(advantage=form).make_batch(scored, memory)
        assert len(memory.statistics_of("total").state_dict()) == remembered


def test_how_units_split_a_round_changes_no_advantage() -> None:
    """Six units of two or two of six: the same samples get the same bits."""
    policy = ToyPolicy()

    def advantages(count: int, per_unit: int) -> np.ndarray:
        units: list[Unit] = make_units(count, per_unit=per_unit)
        scored = collect(policy, units, reward=lambda x: np.round(first_number(x), 2))
        batch = DDPO(advantage="prompt", min_count=2).make_batch(scored, Memory())
        return torch.cat(batch.advantage).numpy()

    assert np.array_equal(advantages(6, 2), advantages(2, 6))


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"algorithm\.min_count must be <= buffer_size \(8\), got 9"
    ):
        build("algorithms", {"name": "ddpo", "buffer_size": 8, "min_count": 9}, "algorithm")
    with pytest.raises(UserError, match=r"algorithm\.clip_range must be > 0"):
        build("algorithms", {"name": "ddpo", "clip_range": 0.0}, "algorithm")
    assert SCORE_FUNCTION.ratio_limit(1) is None
    assert DDPO().ratio_limit(1) == pytest.approx(1e-5)


def test_skipped_last_steps_are_outside_the_loss() -> None:
    policy = ToyPolicy()
    scored = collect(policy, make_units(2), reward=first_number)
    whole = DDPO(advantage="global").make_batch(scored, Memory())
    short = DDPO(advantage="global", skip_last=2).make_batch(scored, Memory())
    steps = {k for one in whole.passes(1) for k in one.steps}
    assert {k for one in short.passes(1) for k in one.steps} == set(sorted(steps)[:-2])
    assert sum(one.weight for one in short.passes(1)) == pytest.approx(1.0, abs=1e-12)
