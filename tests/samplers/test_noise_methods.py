"""Methods that optimise noise: where it stays, how it moves, and what keeps it Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlalign.core.records import Plan
from rlalign.diffusion.paths import RectifiedFlow
from rlalign.engine import Work
from rlalign.engine.chains import ChainGradient
from rlalign.samplers.dno import FLOOR, gaussian_concentration
from rlalign.samplers.doodl import Doodl
from rlalign.samplers.plain import Plain
from rlalign.samplers.reno import Reno, norm_gradient
from tests.samplers.helpers import ExactRewards, GaussianPolicy, engine_of, unit_of
from tests.samplers.test_every_sampler import toy

QUIET = Plan(steps=6, eta=0.0)


class Watched:
    """An engine that keeps the noises whose gradient was asked for, and the gradients."""

    def __init__(self) -> None:
        self.inner = engine_of(toy("vp"), ExactRewards(lambda x_BD: torch.sin(x_BD).sum(1)))
        self.noises: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        inner_map = self.inner.map

        def watched(works: list[Work]) -> list[object]:
            done = inner_map(works)
            for work, found in zip(works, done, strict=True):
                noises = getattr(work, "noises", getattr(work, "z", None))
                assert noises is not None
                self.noises.append(noises[:, 0] if isinstance(work, ChainGradient) else noises)
                self.gradients.append(
                    found.gradient[:, 0] if isinstance(work, ChainGradient) else found.gradient
                )
            return done

        self.inner.map = watched  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("by", ["checkpointing", "inversion"])
def test_doodl_keeps_the_norm_and_its_first_step_is_the_clipped_gradient(by: str) -> None:
    watched = Watched()
    method = Doodl(updates=3, by=by, clip=0.05, momentum=0.9, rate=2.0)
    method.sample(watched.inner, unit_of(4, QUIET))
    z = watched.noises
    assert len(z) == 4
    norms = torch.stack([n.flatten(1).norm(dim=1) for n in z])
    torch.testing.assert_close(norms, norms[:1].expand(4, -1), atol=1e-5, rtol=1e-5)
    speed = torch.zeros_like(z[0])
    for before, after, gradient in zip(z, z[1:], watched.gradients, strict=False):
        speed = 0.9 * speed + (2.0 * gradient).clamp(-0.05, 0.05)
        moved = before + speed
        moved = moved * (norms[0] / moved.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(after, moved, atol=1e-5, rtol=1e-5)


def test_crops_and_perturbation_are_keyed() -> None:
    """Twice the same; other crops are another result. Pictures of 8 x 8 from the toy's own
    decoder."""
    from tests.toy import ToyPolicy

    def run(**settings: object) -> torch.Tensor:
        rewards = ExactRewards(lambda x_BD: x_BD.reshape(len(x_BD), 3, -1)[:, 0].mean(1))
        engine = engine_of(ToyPolicy(), rewards)
        return (
            Doodl(updates=2, precision="float32", **settings)
            .sample(engine, unit_of(2, QUIET))
            .latents
        )

    assert torch.equal(run(crops=3, perturb=1e-2), run(crops=3, perturb=1e-2))
    assert not torch.equal(run(perturb=1e-2), run(perturb=0.0))


def test_dnos_regulariser_has_its_floor_at_noise_and_none_at_a_pattern() -> None:
    """4 log 2 for standard normal noise of 4,096 numbers; all ones are astronomically unlikely;
    order does not matter in law."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(4096) for _ in range(20)]
    noise = torch.from_numpy(rng.standard_normal(4096))
    assert float(gaussian_concentration(noise, 4, orders)) == pytest.approx(FLOOR, abs=0.5)
    assert pytest.approx(2.7726, abs=1e-4) == FLOOR
    assert float(gaussian_concentration(noise, 4, orders)) >= FLOOR - 1e-12
    assert float(gaussian_concentration(torch.ones(4096).double(), 4, orders)) > 1000.0
    shuffled = noise[torch.from_numpy(rng.permutation(4096))]
    assert float(gaussian_concentration(shuffled, 4, orders)) == pytest.approx(FLOOR, abs=0.5)
    striped = noise.abs()  # the right size and the wrong sign: its mean gives it away
    assert float(gaussian_concentration(striped, 4, orders)) > 100.0


def test_renos_regulariser_rests_at_the_mode_of_the_norm() -> None:
    for size in (64, 16384):
        z = torch.randn(2, size, generator=torch.Generator().manual_seed(0)).double()
        at_mode = z / z.norm(dim=1, keepdim=True) * math.sqrt(size - 1)
        assert float(norm_gradient(at_mode).abs().max()) < 1e-12
        wanted = z.clone().requires_grad_()
        value = (0.5 * wanted.norm(dim=1) ** 2 - (size - 1) * wanted.norm(dim=1).log()).sum()
        torch.testing.assert_close(
            norm_gradient(z), torch.autograd.grad(value, wanted)[0], atol=1e-9, rtol=1e-9
        )


def test_renos_fixed_point_under_a_linear_reward() -> None:
    """|x| = (|g| / l + sqrt((|g| / l)^2 + 4 (d - 1))) / 2 where g is the reward's gradient in x and
    l the weight."""
    policy = GaussianPolicy(RectifiedFlow(), size=16)
    plan, weight = Plan(steps=1, rule="flow_ode"), 2.0
    method = Reno(updates=400, lr=0.05, momentum=0.0, clip=100.0, regularise=weight)
    engine = engine_of(policy, lambda x_BD: 3.0 * x_BD[:, 0])
    seen: list[torch.Tensor] = []
    inner = engine.map

    def watched(works: list[Work]) -> list[object]:
        seen.append(works[0].noises)  # type: ignore[attr-defined]
        return inner(works)

    engine.map = watched  # type: ignore[method-assign,assignment]
    method.sample(engine, unit_of(1, plan))
    # one step of a unit Gaussian's flow takes x_1 to its mean 0, plus level's own rounding: g is
    # found, not assumed
    last = seen[-1][0, 0].flatten()
    nudged = [last.clone(), last.clone()]
    nudged[0][0] += 1e-5
    nudged[1][0] -= 1e-5
    ends = [
        ChainGradient(unit=unit_of(1, plan), noises=n.reshape(1, 1, 16, 1, 1)).do(
            policy, ExactRewards(lambda x_BD: 3.0 * x_BD[:, 0])
        )
        for n in nudged
    ]
    g = abs(float(ends[0].total_B[0] - ends[1].total_B[0]) / 2e-5)
    expected = (g / weight + math.sqrt((g / weight) ** 2 + 4 * 15)) / 2
    assert float(last.norm()) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("rule", "eta", "low", "high"), [("flow_sde", 0.7, 0.97, 1.01), ("flow_ode", 0.0, 0.88, 0.93)]
)
def test_the_flow_sde_keeps_the_datas_variance(
    rule: str, eta: float, low: float, high: float
) -> None:
    """N(0, 1) in 28 steps: about 0.99 with noise, 0.91 without; noise put on the clean sample
    instead would leave a half. Seed 0, 6,000 numbers: four standard errors are 0.07."""
    engine = engine_of(GaussianPolicy(RectifiedFlow(), size=60), lambda x_BD: x_BD[:, 0])
    x = Plain().sample(engine, unit_of(100, Plan(steps=28, rule=rule, eta=eta))).latents
    assert low - 0.07 < float(x.var()) < high + 0.07
