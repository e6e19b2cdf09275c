"""Chains as functions of their noises: EDICT runs backwards, and its gradient by inversion is
autograd's and the checkpoints'."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlalign.core.records import Plan, Unit
from rlalign.core.registry import UserError
from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.paths import VariancePreserving
from rlalign.engine.chains import ChainGradient, Edict, Pair, run_chain
from rlalign.policies.base import Policy
from tests.algorithms.helpers import FlowToy
from tests.samplers.helpers import ExactRewards, unit_of
from tests.toy import ToyPolicy


def _wide(policy: ToyPolicy) -> ToyPolicy:
    """The toy in float64, whose media are its latents."""
    policy.decode = lambda latents: latents[:, None]  # type: ignore[method-assign]
    return policy


POLICIES = {
    "vp": lambda: _wide(ToyPolicy(dtype=torch.float64)),
    "flow": lambda: _wide(FlowToy(dtype=torch.float64)),
}


def _start(policy: Policy, unit: Unit) -> torch.Tensor:
    return unit_noise(unit, 0, policy.latent_shape(unit.plan)).double()


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("p", [0.9, 0.93, 0.97, 1.0])
@pytest.mark.parametrize("steps", [7, 50])
def test_the_round_trip_is_exact_also_for_steps_that_do_not_divide_1000(
    kind: str, p: float, steps: int
) -> None:
    policy, unit = POLICIES[kind](), unit_of(3, Plan(steps=steps, eta=0.0))
    chain, z = Edict(policy, unit, p=p, dtype=torch.float64), _start(policy, unit)
    with torch.no_grad():
        end = chain.run(Pair(z, z))
        back = chain.invert(end)
        forth = chain.run(chain.invert(Pair(end.x, end.x)))
    assert float((back.x - z).abs().max()) < 1e-10
    assert float((back.y - z).abs().max()) < 1e-10
    assert (
        float((forth.x - end.x).abs().max()) < 1e-10
    )  # a picture's latents, inverted and sampled again


def test_a_path_that_begins_without_signal_is_refused() -> None:
    """A step divides by it."""
    policy = _wide(ToyPolicy(dtype=torch.float64))
    table = VariancePreserving.scaled_linear().alphas_cumprod
    table[-1] = 0.0
    policy.family.path = VariancePreserving(table, spacing="trailing")
    unit = unit_of(1, Plan(steps=4, eta=0.0))
    with pytest.raises(UserError, match="at timestep 999 the policy's has none .*; take another"):
        Edict(policy, unit, p=0.93, dtype=torch.float64)


def test_mixing_has_the_eigenvalues_one_and_p_squared() -> None:
    """e = 0 and a = 1 leave the mixing alone; mixed at once instead of one after the other they
    would be 1 and 2p - 1."""
    policy, unit = _wide(ToyPolicy(dtype=torch.float64)), unit_of(1, Plan(steps=4, eta=0.0))
    chain = Edict(policy, unit, p=0.93, dtype=torch.float64)
    chain._factors = lambda k: (1.0, 0.0)  # type: ignore[method-assign]
    for k in (0, 1):
        columns = []
        for x, y in ((1.0, 0.0), (0.0, 1.0)):
            with torch.no_grad():
                out = chain.down(Pair(*(torch.full((1, 2, 1, 1), v).double() for v in (x, y))), k)
            columns.append([float(out.x[0, 0]), float(out.y[0, 0])])
        values = np.sort(np.linalg.eigvals(np.array(columns).T).real)
        np.testing.assert_allclose(values, [0.93**2, 1.0], atol=1e-12)


def test_without_noise_to_predict_the_chain_is_a_scaled_identity() -> None:
    policy, unit = _wide(ToyPolicy(dtype=torch.float64)), unit_of(2, Plan(steps=10, eta=0.0))
    with torch.no_grad():
        for parameter in policy.network.parameters():
            parameter.zero_()
        z = _start(policy, unit)
        end = Edict(policy, unit, p=0.93, dtype=torch.float64).run(Pair(z, z))
    levels = policy.path.levels(10)
    scale = float(policy.path.alpha(levels[-1]) / policy.path.alpha(levels[0]))
    torch.testing.assert_close(end.x, scale * z, atol=1e-12, rtol=0)
    torch.testing.assert_close(end.y, scale * z, atol=1e-12, rtol=0)


def test_coupling_alone_lets_the_pair_drift_apart_and_mixing_holds_it() -> None:
    policy, unit = POLICIES["vp"](), unit_of(2, Plan(steps=50, eta=0.0))
    gaps = {}
    for p in (0.93, 1.0):
        with torch.no_grad():
            z = _start(policy, unit)
            end = Edict(policy, unit, p=p, dtype=torch.float64).run(Pair(z, z))
        gaps[p] = float((end.x - end.y).abs().max())
    assert gaps[0.93] < gaps[1.0]


def _score(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x.flatten(1)).sum(1) + 0.5 * x.flatten(1)[:, 0] ** 2


@pytest.mark.parametrize("kind", POLICIES)
def test_the_gradient_by_inversion_is_autograds(kind: str) -> None:
    policy, unit = POLICIES[kind](), unit_of(3, Plan(steps=20, eta=0.0))
    chain, z = Edict(policy, unit, p=0.93, dtype=torch.float64), _start(policy, unit)
    wanted = [z.clone().requires_grad_() for _ in range(2)]
    end = chain.run(Pair(*wanted))
    leaves = [t.detach().requires_grad_() for t in end]  # the end's y was made from its x
    pulls = torch.autograd.grad(sum(_score(t) for t in leaves).sum(), leaves)  # type: ignore[union-attr]
    exact = torch.autograd.grad((_score(end.x) + _score(end.y)).sum(), wanted)
    start, found = chain.pull_back(Pair(*(t.detach() for t in end)), Pair(*pulls))
    for mine, other in zip(found, exact, strict=True):
        assert float((mine - other).abs().max()) < 1e-10 * max(1.0, float(other.abs().max()))
    assert float((start.x - z).abs().max()) < 1e-10


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("noisy", [False, True], ids=["ode", "sde"])
def test_the_gradient_by_checkpoints_is_that_of_finite_differences(kind: str, noisy: bool) -> None:
    policy = POLICIES[kind]()
    rule = "flow_sde" if kind == "flow" else "ddim"
    plan = Plan(steps=6, eta=0.7, rule=rule) if noisy else Plan(steps=6, eta=0.0)
    unit = unit_of(2, plan)
    noises = torch.stack(
        [unit_noise(unit, k, (2, 1, 1)) for k in range(7 if noisy else 1)], dim=1
    ).double()
    found = ChainGradient(unit=unit, noises=noises).do(
        policy, ExactRewards(lambda x_BD: _score(x_BD))
    )
    rng = np.random.default_rng(0)
    for _ in range(6):
        index = tuple(int(rng.integers(s)) for s in noises.shape)
        values = []
        for sign in (1.0, -1.0):
            moved = noises.clone()
            moved[index] += sign * 1e-6
            with torch.no_grad():
                values.append(float(_score(run_chain(policy, unit, moved)).sum()))
        numeric = (values[0] - values[1]) / 2e-6
        assert float(found.gradient[index]) == pytest.approx(numeric, abs=1e-7)


def test_checkpoints_count_every_call_they_make() -> None:
    policy, unit = POLICIES["vp"](), unit_of(2, Plan(steps=6, eta=0.0))
    noises = _start(policy, unit)[:, None]
    ChainGradient(unit=unit, noises=noises).do(policy, ExactRewards(lambda x_BD: _score(x_BD)))
    assert policy.meter.calls == 2 * 6 * 2  # down, and each step again on the way back
