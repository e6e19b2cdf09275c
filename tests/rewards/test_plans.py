"""Rewards of plans: run in the simulator, and read off their lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from rlalign.core.prompts import Prompt
from rlalign.core.records import Space
from rlalign.core.registry import UserError, build
from rlalign.data.mazes.demonstrations import draw_plan, expert, random_ends
from rlalign.data.mazes.maps import MAZES, Maze, centres, is_free, to_plan
from rlalign.data.mazes.routes import routes
from rlalign.data.mazes.tasks import Task
from rlalign.rewards.base import Reward, Scorer, score

UMAZE, MEDIUM = MAZES["umaze"], MAZES["medium"]
HAZARD = {"x": 0.5, "y": -0.5}
"""The middle of a corridor of Medium, on one side of its island."""
PLAN_REWARDS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "clear": ({}, (0.0, 1.0)),
    "detour": (HAZARD, (0.0, 1.0)),
    "hazard": (HAZARD, (0.0, 1.0)),
    "length": ({}, (-np.inf, 0.0)),
    "reach": ({"measure": "time"}, (0.0, 1.0)),
}
"""Reward of plans -> its settings here, its least and its greatest score."""


def reward_of(name: str, **settings: Any) -> Reward:
    reward = build("rewards", {"name": name, **settings})
    assert isinstance(reward, Reward)
    return reward


def scores(reward: Reward, latents: np.ndarray | torch.Tensor, prompts: list[Prompt]) -> np.ndarray:
    return score(reward, reward.load("cpu"), np.asarray(latents, np.float32), prompts)


def tasks(maze: Maze, count: int, apart: int = 3) -> tuple[np.ndarray, list[Prompt]]:
    """(B, 2, 2) starts and goals, and their prompts."""
    rng = np.random.default_rng(7)
    ends_B22 = np.stack([random_ends(maze, rng, apart) for _ in range(count)]).round(3)
    prompts = [
        Task(maze=maze, start=(a, b), goal=(c, d)).prompt for (a, b), (c, d) in ends_B22.tolist()
    ]
    return ends_B22, prompts


def by_routes() -> tuple[np.ndarray, list[Prompt]]:
    """Plans on the two sides of Medium's island, from one place to one other."""
    ends_22 = centres(MEDIUM, [(3, 2), (6, 2)])
    ways = routes("medium", (3, 2), (6, 2))
    # the one through the hazard last
    ways = sorted(ways, key=lambda way: (4, 4) in way)
    plans = [draw_plan(MEDIUM, ends_22, way, 0.0, 32) for way in ways]
    start, goal = ends_22.tolist()
    prompt = Task(maze=MEDIUM, start=tuple(start), goal=tuple(goal)).prompt
    return to_plan(np.stack(plans), MEDIUM), [prompt, prompt]


def jump() -> tuple[np.ndarray, list[Prompt]]:
    """A plan from one arm of UMaze to the other, straight through the wall, whose way points all
    lie in free cells: half of them at each end."""
    ends_22 = centres(UMAZE, [(1, 1), (3, 1)])
    points_H2 = np.repeat(ends_22, 8, axis=0)
    assert is_free(UMAZE, points_H2, 0.2).all()
    start, goal = ends_22.tolist()
    prompt = Task(maze=UMAZE, start=tuple(start), goal=tuple(goal)).prompt
    return to_plan(points_H2[None], UMAZE), [prompt]


@pytest.mark.parametrize("name", PLAN_REWARDS)
def test_a_plan_alone_scores_as_among_others(name: str) -> None:
    """Of two mazes in one batch; noise, no plan at all and the shortest way; within the range."""
    settings, (lowest, highest) = PLAN_REWARDS[name]
    reward = reward_of(name, **settings)
    parts = [tasks(maze, 4) for maze in (UMAZE, MEDIUM)]
    prompts = [prompt for pair in zip(parts[0][1], parts[1][1], strict=True) for prompt in pair]
    latents = np.random.default_rng(0).standard_normal((8, 2, 24)).astype(np.float32)
    latents[2:4] = 0.0
    for row, (maze, (ends_B22, _)) in enumerate(zip((UMAZE, MEDIUM), parts, strict=True), 4):
        shortest = expert(maze, ends_B22[[2], 0], ends_B22[[2], 1], 24)
        latents[row] = to_plan(shortest, maze)[0]
    with np.errstate(all="ignore"):
        together = scores(reward, latents, prompts)
    alone = [scores(reward, latents[[i]], [prompts[i]])[0] for i in range(8)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert ((together >= lowest) & (together <= highest)).all()


def test_the_expert_reaches_and_is_measured_against_itself() -> None:
    ends_B22, prompts = tasks(MEDIUM, 12)
    latents = to_plan(expert(MEDIUM, ends_B22[:, 0], ends_B22[:, 1], 32), MEDIUM)
    assert (scores(reward_of("reach"), latents, prompts) == 1.0).all()
    left = scores(reward_of("reach", measure="time"), latents, prompts)
    assert ((left > 0.3) & (left < 1.0)).all()
    # to the rounding of the latents' float32
    normalised = scores(reward_of("reach", measure="normalised"), latents, prompts)
    np.testing.assert_allclose(normalised, 1.0, atol=0.02)
    noise = np.random.default_rng(1).standard_normal(latents.shape)
    assert scores(reward_of("reach"), noise, prompts).mean() < 0.1


def test_clear_of_way_points_alone_is_won_by_a_jump_and_of_the_line_is_not() -> None:
    """And the simulator sees through it."""
    latents, prompts = jump()
    assert scores(reward_of("clear", parts=0), latents, prompts)[0] > 0.99
    # of 2 m, 1.2 m are too near to the wall or within it
    assert scores(reward_of("clear", parts=64), latents, prompts)[0] == pytest.approx(0.4, abs=0.02)
    assert scores(reward_of("reach"), latents, prompts)[0] == 0.0
    ends_B22, prompts = tasks(UMAZE, 6)
    shortest = to_plan(expert(UMAZE, ends_B22[:, 0], ends_B22[:, 1], 16), UMAZE)
    assert (scores(reward_of("clear"), shortest, prompts) > 0.99).all()


def test_outside_of_the_map_nothing_is_clear() -> None:
    _, prompts = tasks(UMAZE, 1)
    away = np.stack([np.linspace(5.0, 9.0, 16)] * 2)[None]
    assert scores(reward_of("clear"), away, prompts)[0] < 1e-6


def test_length_is_the_lines() -> None:
    latents, prompts = jump()
    assert scores(reward_of("length"), latents, prompts)[0] == pytest.approx(-2.0)


def test_a_detour_keeps_away_from_the_hazard_and_still_arrives() -> None:
    latents, prompts = by_routes()
    assert scores(reward_of("detour", **HAZARD), latents, prompts).tolist() == [1.0, 0.0]
    assert scores(reward_of("reach"), latents, prompts).tolist() == [1.0, 1.0]
    away, near = scores(reward_of("hazard", **HAZARD), latents, prompts)
    assert away > 0.99 and near < 0.9
    # a plan that stays at its start is safe, and goes nowhere
    still = np.repeat(latents[:, :, :1], 32, axis=2)
    assert scores(reward_of("detour", **HAZARD), still, prompts).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["clear", "hazard", "length"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    reward = reward_of(name, **PLAN_REWARDS[name][0])
    assert reward.differentiable
    _, prompts = tasks(MEDIUM, 1)
    scorer = reward.load("cpu")
    latents = 0.3 * torch.randn(1, 2, 12, generator=torch.Generator().manual_seed(2))
    latents.requires_grad_()
    (gradient,) = torch.autograd.grad(scorer(latents, prompts).sum(), latents)
    towards = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (scorer(latents + s * 1e-3 * towards, prompts) for s in (1, -1))
    assert float(ahead - behind) / 2e-3 == pytest.approx(float(gradient.norm()), rel=0.02)


def test_still_plans_have_gradients_without_nan() -> None:
    _, prompts = tasks(UMAZE, 1)
    latents = torch.zeros(1, 2, 8, requires_grad=True)
    score_B = reward_of("length").load("cpu")(latents, prompts)
    (gradient,) = torch.autograd.grad(score_B.sum(), latents)
    assert not gradient.isnan().any()


@pytest.mark.parametrize(("on_error", "wanted"), [("drop", np.nan), (-2.0, -2.0)])
@pytest.mark.parametrize("name", ["reach", "detour"])
def test_a_plan_that_is_not_finite_follows_the_rewards_policy(
    name: str, on_error: Any, wanted: float
) -> None:
    ends_B22, prompts = tasks(UMAZE, 3)
    latents = to_plan(expert(UMAZE, ends_B22[:, 0], ends_B22[:, 1], 16), UMAZE)
    latents[1, 0, 3] = np.inf
    settings = {"x": 9.0, "y": 9.0} if name == "detour" else {}
    found = scores(reward_of(name, on_error=on_error, **settings), latents, prompts)
    np.testing.assert_array_equal(found, np.array([1.0, wanted, 1.0], np.float32))
    with pytest.raises(UserError, match=f"rewards.{name} returned nan for 'from"):
        scores(reward_of(name, **settings), latents, prompts)


class Table(Reward):
    """A user's simulator, which cannot run plans that go far."""

    sees: ClassVar[Space] = "latent"

    def load(self, device: str) -> Scorer:
        def scorer(latents_B2H: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            if latents_B2H.abs().max() > 2.0:
                raise RuntimeError("the ball left the table")
            return torch.ones(len(prompts))

        return scorer


def test_a_simulator_that_raises_takes_no_other_plan_with_it() -> None:
    latents = np.zeros((3, 2, 8))
    latents[1] = 3.0
    found = scores(Table(on_error="drop"), latents, tasks(UMAZE, 3)[1])
    np.testing.assert_array_equal(found, [1.0, np.nan, 1.0])
    with pytest.raises(RuntimeError, match="the ball left the table"):
        scores(Table(), latents, tasks(UMAZE, 3)[1])


def test_what_is_no_plan_is_refused() -> None:
    _, prompts = tasks(UMAZE, 1)
    with pytest.raises(UserError, match=r"rewards.reach needs plans of shape \(B, 2, H\)"):
        scores(reward_of("reach"), np.zeros((1, 4, 16, 16)), prompts)
    with pytest.raises(UserError, match="must have a record with maze, start and goal"):
        scores(reward_of("reach"), np.zeros((1, 2, 8)), [Prompt("a red circle")])
