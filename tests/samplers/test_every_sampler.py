"""What holds for every method: plain where there is nothing to follow, the same whoever works,
honest about its cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rlalign.core import registry
from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.engine import Engine, NoScore
from rlalign.samplers.base import Sampler
from rlalign.samplers.best_of_n import BestOfN
from rlalign.samplers.plain import Plain
from rlalign.sampling import LocalEngine
from tests.algorithms.helpers import FlowToy
from tests.samplers.helpers import ExactRewards, engine_of, unit_of
from tests.toy import ToyFamily, ToyPolicy

PLANS = {"vp": Plan(steps=6, eta=1.0), "flow": Plan(steps=6, rule="flow_sde", eta=0.7)}


def toy(kind: str) -> ToyPolicy:
    policy = ToyPolicy() if kind == "vp" else FlowToy()
    policy.decode = lambda latents: latents[:, None]  # type: ignore[method-assign]
    return policy


def flat(
    x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[str]
) -> torch.Tensor:
    """A classifier that has no opinion but keeps the graph."""
    return 0.0 * x.flatten(1).sum(1)


def leaning(
    x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prompts: Sequence[str]
) -> torch.Tensor:
    """A classifier that likes large first numbers."""
    return x.flatten(1)[:, 0]


FLAT, LEANING = (
    "tests.samplers.test_every_sampler:flat",
    "tests.samplers.test_every_sampler:leaning",
)
SMALL = {
    "best_of_n": {"n": 4},
    "svdd": {"candidates": 4},
    "demon": {"candidates": 4},
    "fk_steering": {"particles": 4},
    "twisted_smc": {"particles": 4},
    "lidar": {"look_aheads": 4, "look_ahead_steps": 3},
    "classifier_guidance": {"classifier": LEANING},
    "training_free": {"rho": 0.2, "mu": 0.2},
    "doodl": {"updates": 2, "by": "checkpointing"},
    "dno": {"updates": 2, "block": 2},
    "reno": {"updates": 2},
    "plain": {},
    "edict": {},
}


def build(name: str, **settings: object) -> Sampler:
    made = registry.build("samplers", {"name": name, **SMALL[name], **settings})
    assert isinstance(made, Sampler)
    return made


OFF: dict[str, dict[str, object]] = {
    "best_of_n": {"n": 1},
    "svdd": {"candidates": 1},
    "demon": {"candidates": 1},
    "fk_steering": {"strength": 0.0, "particles": 1},
    "twisted_smc": {"strength": 0.0, "particles": 1},
    "lidar": {"strength": 0.0},
    "classifier_guidance": {"scale": 0.0},
    "training_free": {"rho": 0.0, "mu": 0.0},
    "dno": {"lr": 0.0},
}
"""Settings that leave a method nothing to do. DOODL, ReNO and EDICT have chains of their own, held
to below."""


def test_every_sampler_is_listed_here() -> None:
    assert set(SMALL) == set(registry.names("samplers"))


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", OFF)
def test_strength_zero_is_bitwise_the_plain_sampler(name: str, kind: str) -> None:
    unit = unit_of(5, PLANS[kind])
    rewards = ExactRewards(lambda x_BD: x_BD[:, 0])
    plain = Plain().sample(engine_of(toy(kind), rewards), unit)
    found = build(name, **OFF[name]).sample(engine_of(toy(kind), rewards), unit)
    assert torch.equal(found.latents, plain.latents)


@pytest.mark.parametrize("name", ["doodl", "reno"])
def test_a_noise_that_is_not_moved_gives_the_plain_chain_without_noise(name: str) -> None:
    unit = unit_of(5, Plan(steps=6, eta=0.0))
    rewards = ExactRewards(lambda x_BD: x_BD[:, 0])
    off: dict[str, object] = {"clip": 0.0} if name == "doodl" else {"lr": 0.0}
    found = build(name, **off).sample(engine_of(toy("vp"), rewards), unit)
    assert torch.equal(found.latents, Plain().sample(engine_of(toy("vp"), rewards), unit).latents)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize(
    "name",
    [
        "best_of_n",
        "svdd",
        "demon",
        "fk_steering",
        "twisted_smc",
        "lidar",
        "classifier_guidance",
        "training_free",
    ],
)
def test_a_constant_reward_changes_nothing(name: str, kind: str) -> None:
    """Candidate 0 has the plain sampler's own noise, and equal rewards keep it. Rows of a step are
    the plain one's, or more."""
    unit, rewards = unit_of(4, PLANS[kind]), ExactRewards(lambda x_BD: 0.0 * x_BD[:, 0] + 0.3)
    settings: dict[str, object] = {"classifier": FLAT} if name == "classifier_guidance" else {}
    if name == "svdd":
        settings["alpha"] = 0.5
    plain = Plain().sample(engine_of(toy(kind), rewards), unit)
    found = build(name, **settings).sample(engine_of(toy(kind), rewards), unit)
    torch.testing.assert_close(found.latents, plain.latents, atol=1e-6, rtol=0)
    if found.roots_BN is not None:
        np.testing.assert_array_equal(found.roots_BN, np.tile(np.arange(4), (4, 1)))


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"plain", "edict", "classifier_guidance"}))
def test_every_method_gets_more_of_the_reward_than_plain_sampling(name: str) -> None:
    unit = unit_of(12, PLANS["vp"])
    rewards = ExactRewards(lambda x_BD: x_BD[:, 0])
    plain = Plain().sample(engine_of(toy("vp"), rewards), unit)
    more: dict[str, object] = {"clip": 0.2} if name == "doodl" else {}
    found = build(name, **more).sample(engine_of(toy("vp"), rewards), unit)
    assert float(found.latents[:, 0].mean()) > float(plain.latents[:, 0].mean()) + 0.02


@pytest.mark.promise
@pytest.mark.parametrize("name", SMALL)
def test_the_result_does_not_depend_on_who_works(name: str) -> None:
    """One thread or three, the same pieces: bit for bit."""
    unit, method = unit_of(7, PLANS["vp"]), build(name)

    def run(lanes: int) -> tuple[torch.Tensor, Engine]:
        rewards = [ExactRewards(lambda x_BD: x_BD[:, 0]) for _ in range(lanes)]
        engine = LocalEngine(toy("vp"), rewards, rows=2)
        return method.sample(engine, unit).latents, engine

    (one, first), (three, second) = run(1), run(3)
    assert torch.equal(one, three)
    assert first.cost.denoiser_calls == second.cost.denoiser_calls
    assert first.cost.reward_queries == second.cost.reward_queries


class Thrice(ToyFamily):
    """Looks with three calls, whatever the plan."""

    @classmethod
    def calls_per_look(cls, plan: Plan) -> int:
        return 3

    def look(self, ask, x, timestep_B, condition, guidance):  # type: ignore[no-untyped-def]
        caption, empty, again = (
            ask(x, timestep_B, words)
            for words in (condition.caption, condition.empty, condition.empty)
        )
        return (caption + empty + again) / 3


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("kind", [ToyFamily, Thrice])
@pytest.mark.parametrize("name", sorted(set(SMALL) - {"demon", "training_free"}))
def test_a_method_costs_what_it_says(name: str, kind: type[ToyFamily], guidance: float) -> None:
    """Denoiser calls of Stable Diffusion's path, whose last step is noisy too, as often as the
    family asks for a look; Demon and recurrence have tests of their own."""
    plan = PLANS["vp"].model_copy(update={"guidance": guidance})
    policy = toy("vp")
    policy.family = kind()
    engine, method = engine_of(policy, ExactRewards(lambda x_BD: x_BD[:, 0])), build(name)
    method.sample(engine, unit_of(3, plan))
    per_look = kind.calls_per_look(plan)
    assert engine.cost.denoiser_calls == 3 * per_look * method.looks(plan)
    assert engine.cost.backward_calls == 3 * per_look * method.looks_back(plan)


@pytest.mark.parametrize(
    "name", ["best_of_n", "svdd", "demon", "fk_steering", "twisted_smc", "lidar"]
)
def test_a_candidate_without_a_score_is_dropped_and_counted(name: str) -> None:
    """The reward is of the first number, and missing where the second is large: about one sample of
    the toy in five."""
    limit = (
        5.0 if name != "demon" else 9.0
    )  # its candidates lie close together, and would all be beyond it

    def reward(x_BD: torch.Tensor) -> torch.Tensor:
        return torch.where(x_BD[:, 1] > limit, torch.nan, x_BD[:, 0])

    engine = engine_of(toy("vp"), ExactRewards(reward))
    more = {next(iter(SMALL[name])): 12}
    found = build(name, **more).sample(engine, unit_of(8, PLANS["vp"]))
    assert torch.isfinite(found.latents).all()
    assert engine.cost.missing_scores > 0
    if name in ("best_of_n", "svdd", "fk_steering"):
        assert float(found.latents[:, 1].max()) <= limit  # what has no score is never the picture


@pytest.mark.parametrize(
    "name", ["best_of_n", "svdd", "demon", "fk_steering", "twisted_smc", "lidar"]
)
def test_a_reward_that_fails_for_all_ends_with_the_latents_so_far(name: str) -> None:
    engine = engine_of(toy("vp"), ExactRewards(lambda x_BD: x_BD[:, 0] * torch.nan))
    with pytest.raises(NoScore, match="gave no score for any of the 4 .* of picture 1") as failure:
        build(name).sample(engine, unit_of(3, PLANS["vp"]))
    assert failure.value.latents is not None
    assert len(failure.value.latents) % 3 == 0


# --- best-of-N and budgets -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("n", "expected"), [(2, 0.564), (4, 1.029), (8, 1.424)])
def test_best_of_n_is_the_largest_of_n_normals(n: int, expected: float) -> None:
    """Seed 0, 400 pictures on a chain that ends in N(0, 0.8551); four standard errors are 0.15."""
    from tests.samplers.helpers import GaussianPolicy, linear_path

    engine = engine_of(GaussianPolicy(linear_path()), lambda x_BD: x_BD[:, 0])
    found = BestOfN(n=n).sample(engine, unit_of(400, Plan(steps=50, eta=1.0)))
    assert float(found.latents.mean()) == pytest.approx(expected * 0.8551**0.5, abs=0.15)


def test_pruning_costs_n_and_with_perfect_foresight_is_best_of_two_n() -> None:
    """Steps without noise and a reward of the sign of what is seen early: the clean sample of a
    linear chain ranks as the end."""
    from tests.samplers.helpers import GaussianPolicy, linear_path

    plan = Plan(steps=8, eta=0.0)
    engine = engine_of(GaussianPolicy(linear_path()), lambda x_BD: x_BD[:, 0])
    pruned = BestOfN(n=4, prune=True)
    assert pruned.looks(plan) == 4 * 8
    found = pruned.sample(engine, unit_of(20, plan))
    assert engine.cost.denoiser_calls == 20 * 4 * 8
    assert engine.cost.reward_queries == 20 * (8 + 4 + 2)
    full = BestOfN(n=8).sample(
        engine_of(GaussianPolicy(linear_path()), lambda x_BD: x_BD[:, 0]), unit_of(20, plan)
    )
    assert torch.equal(found.latents, full.latents)


@pytest.mark.parametrize(
    "name", sorted(n for n in SMALL if registry.load_class("samplers", n).width)
)  # type: ignore[attr-defined]
def test_a_budget_buys_the_widest_method_that_fits(name: str) -> None:
    plan = PLANS["vp"]
    for budget in (200, 2000):
        chosen = build(name).within(budget, plan, 2)
        assert chosen.price(plan, 2) <= budget
        wider = chosen.model_copy(update={chosen.width: getattr(chosen, chosen.width) + 1})
        assert wider.price(plan, 2) > budget or getattr(chosen, chosen.width) >= 1 << 16
    with pytest.raises(UserError, match=r"budget\.denoiser_calls must be >= \d+ for"):
        build(name).within(1, plan, 2)
