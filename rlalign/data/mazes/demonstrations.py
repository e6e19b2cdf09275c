"""Plans that lead from a start to a goal: the expert, for pretraining and as a yardstick.

A plan follows a way of cells in a lane of its own, nearer to one wall or to the other, rounds its
corners, and has its way points at equal distances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlalign.data.mazes.maps import JITTER, Cell, Maze, cells_of, centres
from rlalign.data.mazes.routes import cell_pairs, routes

LANE = 0.25
"""Metres that a lane lies off the middle of its way, at most."""
_FINE = 0.02  # metres between the points that are smoothed
_SMOOTH = 0.12  # metres: standard deviation of the smoothing


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Plans that lead to their goals."""

    points_BH2: np.ndarray
    """(B, H, 2) way points in metres; the first is the start and the last the goal."""
    route_B: np.ndarray
    """(B,) which of its routes a plan takes; 0 is the shortest."""

    @property
    def starts_B2(self) -> np.ndarray:
        return self.points_BH2[:, 0]

    @property
    def goals_B2(self) -> np.ndarray:
        return self.points_BH2[:, -1]


def demonstrate(maze: Maze, rng: np.random.Generator, count: int, horizon: int) -> Demonstrations:
    """``count`` plans of ``horizon`` way points between random places in two different cells. Where
    a maze has several routes between them, each is as likely as the others."""
    plans = []
    taken = []
    for _ in range(count):
        ends = random_ends(maze, rng)
        choices = routes(maze.name, *_cell_pair(maze, ends))
        taken.append(int(rng.integers(len(choices))))
        lane = float(rng.uniform(-LANE, LANE))
        plans.append(draw_plan(maze, ends, choices[taken[-1]], lane, horizon))
    return Demonstrations(points_BH2=np.stack(plans), route_B=np.array(taken))


def random_ends(maze: Maze, rng: np.random.Generator, apart: int = 1, ways: int = 1) -> np.ndarray:
    """(2, 2) metres: a start and a goal, off the middles of their cells as PointMaze has them.

    Their cells are ``apart`` or more steps from each other on the shortest way, and ``ways`` or
    more routes lead from one to the other.
    """
    pairs = cell_pairs(maze.name, apart, ways)
    chosen = pairs[int(rng.integers(len(pairs)))]
    return centres(maze, chosen) + rng.uniform(-JITTER, JITTER, (2, 2))


def expert(maze: Maze, starts_B2: np.ndarray, goals_B2: np.ndarray, horizon: int) -> np.ndarray:
    """(B, H, 2) metres: the shortest route of each start and goal, in the middle of its way."""
    plans = []
    for start_2, goal_2 in zip(starts_B2, goals_B2, strict=True):
        ends = np.stack([start_2, goal_2])
        shortest = routes(maze.name, *_cell_pair(maze, ends))[0]
        plans.append(draw_plan(maze, ends, shortest, 0.0, horizon))
    return np.stack(plans)


def draw_plan(
    maze: Maze, ends_22: np.ndarray, way: tuple[Cell, ...], lane: float, horizon: int
) -> np.ndarray:
    """(H, 2) metres: a plan from a start to a goal along a way of cells, ``lane`` metres to the
    left of its middle."""
    corners_N2 = centres(maze, way)
    if len(way) > 2:
        # in a turn the lanes before and behind it meet
        steps_N2 = np.diff(corners_N2, axis=0)
        left_N2 = np.stack([-steps_N2[:, 1], steps_N2[:, 0]], axis=1)
        turns_N1 = (np.abs(steps_N2[1:] - steps_N2[:-1]).sum(axis=1) > 0)[:, None]
        corners_N2[1:-1] += lane * (left_N2[:-1] + turns_N1 * left_N2[1:])
    corners_N2[[0, -1]] = ends_22
    return _resample(_smooth(corners_N2), horizon)


def _smooth(corners_N2: np.ndarray) -> np.ndarray:
    """A line through corners, rounded; its ends stay where they are."""
    length = float(np.linalg.norm(np.diff(corners_N2, axis=0), axis=1).sum())
    line_M2 = _resample(corners_N2, max(round(length / _FINE), 2) + 1)

    # a Gaussian mean of the line, which is turned about at its ends
    reach = min(round(3 * _SMOOTH / _FINE), len(line_M2) - 1)
    before_R2 = 2 * line_M2[0] - line_M2[reach:0:-1]
    behind_R2 = 2 * line_M2[-1] - line_M2[-2 : -2 - reach : -1]
    padded_M2 = np.concatenate([before_R2, line_M2, behind_R2])
    weight_K = np.exp(-0.5 * (np.arange(-reach, reach + 1) * _FINE / _SMOOTH) ** 2)
    weight_K /= weight_K.sum()
    return np.stack([np.convolve(part, weight_K, "valid") for part in padded_M2.T], axis=1)


def _resample(line_N2: np.ndarray, count: int) -> np.ndarray:
    """(count, 2) points of a line at equal distances along it."""
    along_N = np.concatenate([[0.0], np.linalg.norm(np.diff(line_N2, axis=0), axis=1).cumsum()])
    at_H = np.linspace(0.0, along_N[-1], count)
    return np.stack([np.interp(at_H, along_N, part) for part in line_N2.T], axis=1)


def _cell_pair(maze: Maze, ends_22: np.ndarray) -> tuple[Cell, Cell]:
    start, goal = cells_of(maze, ends_22)
    return (int(start[0]), int(start[1])), (int(goal[0]), int(goal[1]))
