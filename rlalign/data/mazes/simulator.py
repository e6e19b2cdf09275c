"""The ball's motion along many plans at once: PointMaze's dynamics in NumPy.

A ball of 4.19 kg is pushed by up to 100 N each way, 100 times a second, with a damping of 1 N s/m.
Its velocity is at most 5 m/s each way before a step. As MuJoCo's Euler does, damping acts on the
velocity after the step and the place moves on with that velocity:

    v <- v + h (force - damping v) / (mass + h damping),    p <- p + h v

Walls are hard and without friction: a ball that touches one loses the velocity towards it. MuJoCo's
are soft by a few millimetres; without contact both agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlalign.data.mazes.maps import CELL, GOAL_RADIUS, RADIUS, Maze, cells_of, centres

STEP = 0.01
"""Seconds of a step h."""
MASS = 1000.0 * 4.0 / 3.0 * math.pi * RADIUS**3
"""kg: a ball of water's density."""
DAMPING = 1.0
"""N s/m."""
FORCE = 100.0
"""N of an action of 1."""
FASTEST = 5.0
"""m/s each way before a step."""

GAIN = 10.0
"""Action per metre to the way point that the controller aims at."""
BRAKE = 1.0
"""Action per m/s against the velocity."""
NEAR = 0.2
"""Metres from a way point at which the controller goes on to the next one."""
_AT_ONCE = 4  # way points that one step may pass


Disturb = Callable[[int, np.ndarray], np.ndarray]
"""(number of the step, (B, 2) places) -> (B, 2) free places to which the balls are carried."""
PlanAnew = Callable[[int, np.ndarray], np.ndarray | None]
"""(number of the step, (B, 2) places) -> (B, H, 2) way points in metres, or None: go on."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of plans. A plan with a number that is not finite goes nowhere: it is not
    reached."""

    reached_B: np.ndarray
    """(B,) bool: in time the ball came within ``GOAL_RADIUS`` of the goal, on its way to a way
    point that lies there too: a goal that is passed by chance is not reached."""
    steps_B: np.ndarray
    """(B,) steps until then; all that there were where the goal was not reached."""
    passed_B: np.ndarray
    """(B,) way points of the last plan that the controller left behind."""
    contact_B: np.ndarray
    """(B,) steps in which the ball touched a wall."""
    path_BT2: np.ndarray
    """(B, T + 1, 2) metres: where the ball was, from its start; it stays where it reached the
    goal."""

    @property
    def seconds_B(self) -> np.ndarray:
        """(B,) seconds until the goal was reached."""
        return self.steps_B * STEP


def simulate(
    maze: Maze,
    points_BH2: np.ndarray,
    starts_B2: np.ndarray,
    goals_B2: np.ndarray,
    *,
    seconds: float | None = None,
    disturb: Disturb = lambda step, place_B2: place_B2,
    plan_anew: PlanAnew = lambda step, place_B2: None,
) -> Outcome:
    """Lets a ball at rest follow each plan's way points in metres, for the maze's time or
    ``seconds``.

    The controller aims at one way point after the other, and at none before it was near those ahead
    of it: a plan through a wall ends there. Before every step ``disturb`` may move the balls, and
    ``plan_anew`` may give other plans, which are then followed from their first way point on; the
    balls keep their velocities. Balls that have arrived lie still.
    """
    steps = round((maze.seconds if seconds is None else seconds) / STEP)
    sound_B = np.isfinite(points_BH2.sum(axis=(1, 2)))
    points_BH2 = np.where(sound_B[:, None, None], points_BH2, starts_B2[:, None])
    place_B2, velocity_B2 = np.array(starts_B2, dtype=float), np.zeros(np.shape(starts_B2))
    aim_B, contact_B = np.zeros((2, len(place_B2)), dtype=int)
    steps_B = np.full_like(aim_B, steps)
    path_BT2 = np.empty((len(place_B2), steps + 1, 2))
    path_BT2[:, 0] = place_B2
    going_B = sound_B.copy()
    for step in range(steps + 1):
        # where they are, by which plans, and who is there
        place_B2 = np.where(going_B[:, None], disturb(step, place_B2), place_B2)
        points_BH2, aim_B = _renew(plan_anew(step, place_B2), place_B2, points_BH2, aim_B)
        aim_B = _pass_points(points_BH2, place_B2, aim_B)
        aim_B2 = _points_at(points_BH2, aim_B)
        arrives_B = going_B & _are_there(place_B2, aim_B2, goals_B2)
        steps_B[arrives_B] = step
        going_B &= ~arrives_B
        if step == steps or not going_B.any():
            path_BT2[:, step:] = place_B2[:, None]
            break

        # a step of the others
        action_B2 = control(aim_B2, place_B2, velocity_B2)
        *moved, touches_B = advance(maze, place_B2, velocity_B2, action_B2)
        place_B2, velocity_B2 = np.where(going_B[:, None], moved, [place_B2, velocity_B2])
        contact_B += going_B & touches_B
        path_BT2[:, step + 1] = place_B2
    return Outcome(
        reached_B=sound_B & ~going_B,
        steps_B=steps_B,
        passed_B=aim_B,
        contact_B=contact_B,
        path_BT2=path_BT2,
    )


def _renew(
    anew_BH2: np.ndarray | None, place_B2: np.ndarray, points_BH2: np.ndarray, aim_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Way points and which of them are aimed at, once there may be other plans; a number of those
    that is not finite is the ball's own place."""
    if anew_BH2 is None:
        return points_BH2, aim_B
    return np.where(np.isfinite(anew_BH2), anew_BH2, place_B2[:, None]), np.zeros_like(aim_B)


def _are_there(place_B2: np.ndarray, aim_B2: np.ndarray, goals_B2: np.ndarray) -> np.ndarray:
    """(B,) bool: whether balls and the way points they aim at are at the goals."""
    is_there_B = _is_near(place_B2, goals_B2, GOAL_RADIUS)
    return is_there_B & _is_near(aim_B2, goals_B2, GOAL_RADIUS)


def _points_at(points_BH2: np.ndarray, number_B: np.ndarray) -> np.ndarray:
    return points_BH2[np.arange(len(number_B)), number_B]


def _pass_points(points_BH2: np.ndarray, place_B2: np.ndarray, aim_B: np.ndarray) -> np.ndarray:
    """(B,) which way point each ball aims at next, the last one when it has passed all."""
    for _ in range(_AT_ONCE):
        is_passed_B = _is_near(place_B2, _points_at(points_BH2, aim_B), NEAR)
        aim_B = np.minimum(aim_B + is_passed_B, points_BH2.shape[1] - 1)
    return aim_B


def control(aim_B2: np.ndarray, place_B2: np.ndarray, velocity_B2: np.ndarray) -> np.ndarray:
    """(B, 2) actions in [-1, 1] towards a place: proportional to the way to it, with a brake."""
    return (GAIN * (aim_B2 - place_B2) - BRAKE * velocity_B2).clip(-1.0, 1.0)


def advance(
    maze: Maze, place_B2: np.ndarray, velocity_B2: np.ndarray, action_B2: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, velocities and (B,) bool whether a wall was touched, after one step of actions in
    [-1, 1]."""
    velocity_B2 = velocity_B2.clip(-FASTEST, FASTEST)
    push_B2 = FORCE * action_B2.clip(-1.0, 1.0) - DAMPING * velocity_B2
    velocity_B2 = velocity_B2 + STEP * push_B2 / (MASS + STEP * DAMPING)
    return _keep_out_of_walls(maze, place_B2 + STEP * velocity_B2, velocity_B2)


def _keep_out_of_walls(
    maze: Maze, place_B2: np.ndarray, velocity_B2: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moves balls whose middle lies in a free cell out of the walls around it: first those on its
    sides, then a corner."""
    cell_B2 = cells_of(maze, place_B2)
    middle_B2 = centres(maze, cell_B2)
    row_B, column_B = cell_B2.T
    offset_B2 = place_B2 - middle_B2
    room = CELL / 2 - RADIUS

    # which neighbour the ball leans to on each axis, and whether it is a wall
    side_B2 = np.where(offset_B2 < 0, -1, 1)
    across_B = maze.walls[row_B, column_B + side_B2[:, 0]]
    along_B = maze.walls[row_B - side_B2[:, 1], column_B]
    corner_B = maze.walls[row_B - side_B2[:, 1], column_B + side_B2[:, 0]]
    hits_B2 = np.stack([across_B, along_B], axis=1) & (np.abs(offset_B2) > room)
    offset_B2 = np.where(hits_B2, side_B2 * room, offset_B2)
    velocity_B2 = np.where(hits_B2 & (velocity_B2 * side_B2 > 0), 0.0, velocity_B2)

    # a corner alone, where neither side is a wall
    from_corner_B2 = offset_B2 - side_B2 * CELL / 2
    apart_B = np.maximum(np.linalg.norm(from_corner_B2, axis=1), 1e-9)
    bumps_B = corner_B & ~across_B & ~along_B & (apart_B < RADIUS)
    normal_B2 = from_corner_B2 / apart_B[:, None]
    inward_B = np.minimum((velocity_B2 * normal_B2).sum(axis=1), 0.0) * bumps_B
    velocity_B2 = velocity_B2 - inward_B[:, None] * normal_B2
    depth_B = (RADIUS - apart_B) * bumps_B
    return (
        middle_B2 + offset_B2 + depth_B[:, None] * normal_B2,
        velocity_B2,
        hits_B2.any(axis=1) | bumps_B,
    )


def _is_near(place_B2: np.ndarray, other_B2: np.ndarray, metres: float) -> np.ndarray:
    return np.linalg.norm(place_B2 - other_B2, axis=1) <= metres
