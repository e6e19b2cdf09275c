"""Runs whose rewards see latents: nothing is decoded for them, and Ray gives the same numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.alignment.loop import train_local
from rlalign.config import Run
from rlalign.core.records import Plan, Space
from rlalign.core.registry import build
from rlalign.engine import Rewards
from rlalign.engine.local import LiveRewards, LocalEngine
from rlalign.engine.pieces import Look, Produce, pull_on
from rlalign.policies.base import Policy
from rlalign.sampling.compare import develop
from tests.runs import assert_same_run, metrics, points_run, quiet
from tests.toy import PROMPTS, ToyPolicy, make_units

LATENT = "rewards=[{name: quadratic, target: [0.2]}]"
BOTH = "rewards=[{name: quadratic, target: [0.2]}, {name: jpeg, weight: 0.5}]"


def run_of(*overrides: str) -> Run:
    return points_run("rounds=2", "runtime.rollout.workers=1", *overrides)


def asked_spaces(run: Run) -> dict[str, set[Space]]:
    return {stream: set(run.spaces_for(stream)) for stream in ("train", "evaluate")}


def test_media_are_wanted_where_they_are_seen_or_shown() -> None:
    shown: set[Space] = {"media", "latent"}
    assert asked_spaces(run_of(LATENT)) == {"train": {"latent"}, "evaluate": shown}
    assert asked_spaces(run_of(LATENT, "write_pairs=all")) == {"train": shown, "evaluate": shown}
    held_out = "evaluate.rewards=[{name: quadratic}]"
    media: set[Space] = {"media"}
    assert asked_spaces(run_of(held_out)) == {"train": media, "evaluate": shown}


def test_a_run_decodes_what_it_shows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures of three evaluations, and none of the rounds between them."""
    decoded: list[int] = []
    show = Policy.show

    def counted(self: Policy, clean: torch.Tensor, spaces: Iterable[Space]) -> Any:
        found = show(self, clean, spaces)
        decoded.append(len(found.get("media", ())))
        return found

    monkeypatch.setattr(Policy, "show", counted)
    train_local(run_of(LATENT), tmp_path / "run", resume=False, on_record=quiet)
    assert sum(decoded) == 2 * 4, "before and after"
    lines = metrics(tmp_path / "run")
    assert all(line["reward/quadratic/mean"] < 0.0 for line in lines)


class Blind(ToyPolicy):
    """A policy without a decoder."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nothing is to be decoded")


def blind_engine() -> tuple[LocalEngine, Rewards]:
    rewards = LiveRewards([build("rewards", {"name": "quadratic", "target": [1.0]})])  # type: ignore[list-item]
    return LocalEngine(Blind(), [rewards], rows=4, parallel=False), rewards


def test_looks_scores_and_gradients_ask_for_no_picture() -> None:
    """What the methods that look ahead and those that follow gradients are made of."""
    engine, rewards = blind_engine()
    (unit,) = make_units(1, per_unit=4, plan=Plan(steps=3))
    made, seen = engine.map(
        [
            Produce(unit=unit, version=0, spaces=frozenset({"latent"})),
            Look(unit=unit, x=engine.begin(unit), k=0, score=True),
        ]
    )
    final = made.trajectory.latents_BK1[:, -1]
    assert (made.samples["latent"] == final).all()
    assert made.scores.total_B == pytest.approx(-((final - 1.0) ** 2).reshape(4, -1).sum(1))
    assert seen.total_B == pytest.approx(-((seen.clean - 1.0) ** 2).flatten(1).sum(1).numpy())
    clean = torch.from_numpy(final).requires_grad_()
    _, samples, pulls = pull_on(Blind(), rewards, clean, unit.prompts)
    (gradient,) = torch.autograd.grad(samples, clean, pulls)
    torch.testing.assert_close(gradient, -2.0 * (clean.detach() - 1.0))


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "fk_steering", "particles": 2},
        {"name": "svdd", "candidates": 2},
        {"name": "demon", "candidates": 2},
        {"name": "training_free"},
        {"name": "classifier_guidance", "of": "reward"},
        {"name": "twisted_smc", "particles": 2},
        {"name": "doodl", "updates": 1, "crops": 2},
        {"name": "dno", "updates": 1},
    ],
    ids=lambda sampler: sampler["name"],
)
def test_a_method_follows_a_reward_of_latents(sampler: dict[str, Any]) -> None:
    engine, _ = blind_engine()
    (unit,) = make_units(1, per_unit=4, plan=Plan(steps=3))
    method: Any = build("samplers", sampler)
    found = method.sample(engine, unit)
    assert torch.isfinite(found.latents).all()
    assert engine.cost.reward_queries + engine.cost.gradient_calls > 0


def test_what_is_shown_is_scored_as_latents() -> None:
    rewards = LiveRewards([build("rewards", {"name": "quadratic"})])  # type: ignore[list-item]
    engine = LocalEngine(ToyPolicy(), [rewards], rows=2, parallel=False)
    (unit,) = make_units(1, per_unit=4, plan=Plan(steps=3))
    x = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    media, scores = develop(engine, unit, x)
    assert media.shape[:3] == (len(PROMPTS), 1, 3)
    assert scores.total_B == pytest.approx(-(x**2).flatten(1).sum(1).numpy(), rel=1e-6)


@pytest.mark.parametrize("rewards", [LATENT])
def test_reward_backpropagation_goes_through_latents(rewards: str, tmp_path: Path) -> None:
    run = run_of(
        rewards, "algorithm={name: reward_backprop, last_steps: 1}", "learner.updates_per_round=1"
    )
    train_local(run, tmp_path / "run", resume=False, on_record=quiet)
    assert all(line["grad_norm"] > 0.0 for line in metrics(tmp_path / "run"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "rewards", [pytest.param(LATENT, id="latent"), pytest.param(BOTH, id="latent and media")]
)
def test_on_ray_it_is_the_local_run(rewards: str, tmp_path: Path) -> None:
    from rlalign.runtime import train_on_ray

    train_local(run_of(rewards), tmp_path / "local", resume=False, on_record=quiet)
    train_on_ray(run_of(rewards), tmp_path / "ray", resume=False, on_record=quiet)
    assert_same_run(tmp_path / "ray", tmp_path / "local")
