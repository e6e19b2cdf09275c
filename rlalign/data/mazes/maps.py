"""The mazes, where their walls are, and plans on the latent's scale."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlalign.core.registry import UserError, nearest

CELL = 1.0
"""Metres on a side of a cell."""

RADIUS = 0.1
"""Metres: the ball's radius."""

GOAL_RADIUS = 0.45
"""Metres from the goal at which it is reached."""

JITTER = 0.25
"""Metres that a start or a goal lies off the middle of its cell, at most, each way."""

MazeName = Literal["umaze", "medium", "large"]

Cell = tuple[int, int]
"""Row from above and column from the left."""


@dataclass(frozen=True, kw_only=True)
class Maze:
    """A map of cells, its rows from above: "#" is a wall, "." is free."""

    name: str
    rows: tuple[str, ...]
    seconds: float
    """What a plan may take."""

    @functools.cached_property
    def walls(self) -> np.ndarray:
        """(R, C) bool: which cells are walls. The outer ones all are."""
        return np.array([[cell == "#" for cell in row] for row in self.rows])

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of the map in metres, as matplotlib's ``imshow`` takes
        them."""
        rows, columns = self.walls.shape
        return (-columns * CELL / 2, columns * CELL / 2, -rows * CELL / 2, rows * CELL / 2)

    @property
    def scale(self) -> float:
        """Metres of one unit of a latent: half of the longer side within the outer walls, so that
        every free place lies in [-1, 1]."""
        return (max(self.walls.shape) - 2) * CELL / 2

    @property
    def free(self) -> tuple[Cell, ...]:
        """Every free cell, in reading order."""
        return tuple((int(row), int(column)) for row, column in np.argwhere(~self.walls))


def _maze(name: str, seconds: float, rows: str) -> Maze:
    return Maze(name=name, seconds=seconds, rows=tuple(rows.split()))


MAZES: dict[str, Maze] = {
    maze.name: maze
    for maze in (
        _maze("umaze", 3.0, "##### #...# ###.# #...# #####"),
        _maze(
            "medium",
            6.0,
            "######## #..##..# #..#...# ##...### #..#...# #.#..#.# #...#..# ########",
        ),
        _maze(
            "large",
            8.0,
            "############ #....#.....# #.##.#.#.#.# #......#...# #.####.###.#"
            " #..#.#.....# ##.#.#.#.### #..#...#...# ############",
        ),
    )
}
"""Name -> maze: PointMaze's UMaze, Medium and Large of Gymnasium-Robotics, after D4RL (Fu 2020,
arXiv:2004.07219), with the time that their episodes last."""


def find_maze(name: object) -> Maze:
    """The maze of that name. Raises UserError where there is none."""
    if isinstance(name, str) and name in MAZES:
        return MAZES[name]
    raise UserError(
        f"maze must be one of {', '.join(MAZES)}, got {name!r}; {nearest(str(name), [*MAZES])}"
    )


def centres(maze: Maze, cells: Sequence[Cell] | np.ndarray) -> np.ndarray:
    """(N, 2) middles of cells in metres."""
    left, _, _, top = maze.extent
    row_N, column_N = np.asarray(cells, dtype=float).reshape(-1, 2).T
    return np.stack([left + (column_N + 0.5) * CELL, top - (row_N + 0.5) * CELL], axis=1)


def cells_of(maze: Maze, points_N2: np.ndarray) -> np.ndarray:
    """(..., 2) rows and columns of the cells that points lie in, the nearest one for points outside
    of the map."""
    left, _, _, top = maze.extent
    rows, columns = maze.walls.shape
    column_N = np.floor((points_N2[..., 0] - left) / CELL).clip(0, columns - 1)
    row_N = np.floor((top - points_N2[..., 1]) / CELL).clip(0, rows - 1)
    return np.stack([row_N, column_N], axis=-1).astype(int)


def is_free(maze: Maze, points_N2: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """(...) bool: whether points lie farther than ``margin`` metres, below half a cell, from every
    wall."""
    cell_N2 = cells_of(maze, points_N2)
    outside_N = maze.walls[cell_N2[..., 0], cell_N2[..., 1]]
    return ~outside_N & (wall_distance(maze, points_N2) > margin)


def wall_distance(maze: Maze, points_N2: np.ndarray) -> np.ndarray:
    """(...) metres from points to the nearest wall, 0 within one."""
    middle_W2 = centres(maze, np.argwhere(maze.walls))
    apart_NW2 = np.abs(points_N2[..., None, :] - middle_W2) - CELL / 2
    return np.linalg.norm(apart_NW2.clip(0.0), axis=-1).min(axis=-1)


def to_plan(points_BH2: np.ndarray, maze: Maze) -> np.ndarray:
    """(B, 2, H) on the latent's scale of way points (B, H, 2) in metres; tensors too."""
    return points_BH2.swapaxes(1, 2) / maze.scale


def to_points(plan_B2H: np.ndarray, maze: Maze) -> np.ndarray:
    """(B, H, 2) way points in metres of plans (B, 2, H) on the latent's scale; tensors too."""
    return plan_B2H.swapaxes(1, 2) * maze.scale
