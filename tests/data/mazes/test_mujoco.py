"""The simulator against MuJoCo's own PointMaze."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlalign.data.mazes.demonstrations import demonstrate
from rlalign.data.mazes.maps import GOAL_RADIUS, MAZES, Maze
from rlalign.data.mazes.simulator import STEP, _pass_points, advance, control

gymnasium = pytest.importorskip("gymnasium")
robotics = pytest.importorskip("gymnasium_robotics", reason="the extra planning")

NAMES = {"umaze": "UMaze", "medium": "Medium", "large": "Large"}


def environment(maze: Maze) -> Any:
    gymnasium.register_envs(robotics)
    return gymnasium.make(f"PointMaze_{NAMES[maze.name]}-v3", reward_type="sparse").unwrapped


@pytest.mark.parametrize("name", NAMES)
def test_the_published_maps_and_numbers_are_these(name: str) -> None:
    maze = MAZES[name]
    one = environment(maze)
    assert np.array_equal(np.array(one.maze.maze_map) == 1, maze.walls)
    left, _, _, top = maze.extent
    np.testing.assert_allclose(
        one.maze.cell_rowcol_to_xy(np.array([1, 1])), [left + 1.5, top - 1.5]
    )
    assert one.point_env.model.opt.timestep == STEP
    # of its success too
    near, far = (np.array([GOAL_RADIUS + d, 0.0]) for d in (-1e-3, 1e-3))
    found = [one.compute_reward(place, np.zeros(2), {}) for place in (near, far)]
    assert [float(reward) for reward in found] == [1.0, 0.0]


@pytest.mark.parametrize(("name", "count"), [("umaze", 30), ("medium", 20)])
def test_plans_without_contact_lead_the_same_way(name: str, count: int) -> None:
    """To 1 cm, for 0.8 seconds: both are given the actions that follow a plan here."""
    maze = MAZES[name]
    shown = demonstrate(maze, np.random.default_rng(9), count, 32)
    point = environment(maze).point_env
    farthest = 0.0
    for points_1H2 in shown.points_BH2[:, None]:
        place_12, velocity_12 = points_1H2[:, 0], np.zeros((1, 2))
        point.set_state(place_12[0], velocity_12[0])
        aim_1 = np.zeros(1, dtype=int)
        for _ in range(80):
            aim_1 = _pass_points(points_1H2, place_12, aim_1)
            action_12 = control(points_1H2[:, aim_1[0]], place_12, velocity_12)
            place_12, velocity_12, touches_1 = advance(maze, place_12, velocity_12, action_12)
            assert not touches_1.any()
            observed_4, *_ = point.step(action_12[0])
            farthest = max(farthest, float(np.abs(observed_4[:2] - place_12[0]).max()))
        assert np.linalg.norm(place_12 - points_1H2[:, 0]) > 0.05
    assert farthest < 1e-2
