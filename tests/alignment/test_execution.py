"""Plans followed in the simulator: one of them, or plans anew on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rlalign
from rlalign.core.registry import UserError
from rlalign.data.mazes.maps import MAZES
from rlalign.data.mazes.tasks import Task
from rlalign.policies.base import Policy

UMAZE = MAZES["umaze"]
ENDS = [((-1.0, 1.0), (-1.0, -1.0)), ((-0.9, 0.9), (-1.1, -0.9)), ((-1.1, -1.0), (-1.0, 1.1))]
PROMPTS = [Task(maze=UMAZE, start=start, goal=goal).prompt for start, goal in ENDS]
PLAN = {"steps": 5, "eta": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    return rlalign.load_policy("tiny_planner")


def test_one_plan_is_what_the_reward_follows(policy: Policy) -> None:
    outcome = rlalign.execute_plans(policy, PROMPTS, **PLAN)
    latents = policy.sample(PROMPTS, output="latents", **PLAN)
    time = rlalign.load_reward("reach", measure="time")(latents, PROMPTS).numpy()
    assert outcome.reached_B.all()
    np.testing.assert_allclose(time, 1.0 - outcome.seconds_B / UMAZE.seconds, rtol=1e-5)


def test_balls_that_are_carried_away_arrive_with_plans_anew_alone(policy: Policy) -> None:
    """Near their goals, behind UMaze's turn, they are put back to their starts: one plan aims
    through the wall from there."""
    late_B = rlalign.execute_plans(policy, PROMPTS, **PLAN).steps_B - 30
    starts_B2 = np.array([start for start, _ in ENDS])

    def carry_back(step: int, place_B2: np.ndarray) -> np.ndarray:
        return np.where((late_B == step)[:, None], starts_B2, place_B2)

    asked = {"disturb": carry_back, "seconds": 8.0, **PLAN}
    assert not rlalign.execute_plans(policy, PROMPTS, **asked).reached_B.any()
    assert rlalign.execute_plans(policy, PROMPTS, replan_every=100, **asked).reached_B.all()


def test_plans_anew_arrive_where_nothing_disturbs(policy: Policy) -> None:
    """And until the first of them the balls go as with one plan."""
    once = rlalign.execute_plans(policy, PROMPTS, **PLAN)
    anew = rlalign.execute_plans(policy, PROMPTS, replan_every=80, **PLAN)
    assert anew.reached_B.all()
    np.testing.assert_array_equal(anew.path_BT2[:, :81], once.path_BT2[:, :81])
    assert (anew.path_BT2[:, 120] != once.path_BT2[:, 120]).any()


def test_what_cannot_be_followed_is_refused(policy: Policy) -> None:
    with pytest.raises(UserError, match=r"replan_every must be 0 \(one plan\) or more, got -1"):
        rlalign.execute_plans(policy, PROMPTS, replan_every=-1, **PLAN)
    medium = Task(maze=MAZES["medium"], start=(-2.5, 2.5), goal=(-2.5, 1.5)).prompt
    with pytest.raises(UserError, match="prompts must be of one maze, got umaze, medium"):
        rlalign.execute_plans(policy, [*PROMPTS, medium], **PLAN)
    with pytest.raises(UserError, match="prompts must be of one maze, got no prompts"):
        rlalign.execute_plans(policy, [], **PLAN)
