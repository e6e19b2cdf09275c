"""Ways from cell to cell, one of each kind that a maze has.

Two ways are of one kind where one can be moved into the other without crossing a wall. What tells
them apart are the maze's islands, walls that do not hang together with the outer ones: around each
of them a way winds by an angle, and angles of ways between two cells differ by whole turns.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from rlalign.core.registry import UserError
from rlalign.data.mazes.maps import MAZES, Cell, Maze, centres

_STEPS = ((0, 1), (1, 0))
_TOUCHING = (*_STEPS, (1, 1), (1, -1))
STRETCH = 1.6
"""A way of another kind counts where it is no longer than this many times the shortest, or than the
shortest and two cells."""


@functools.cache
def routes(name: str, start: Cell, goal: Cell) -> tuple[tuple[Cell, ...], ...]:
    """The shortest way of each kind between two free cells of a maze, the shortest first."""
    import networkx

    maze = MAZES[name]
    graph = _graph(maze, _STEPS, walls=False)
    shortest = networkx.shortest_path_length(graph, start, goal)
    limit = int(max(STRETCH * shortest, shortest + 2))
    best: dict[tuple[int, ...], tuple[Cell, ...]] = {}
    ways = networkx.all_simple_paths(graph, start, goal, cutoff=limit)
    for way in sorted(map(tuple, ways), key=lambda way: (len(way), way)) or [(start,)]:
        best.setdefault(kind_of(maze, centres(maze, way)), way)
    return tuple(best.values())


@functools.cache
def cell_pairs(name: str, apart: int, ways: int = 1) -> tuple[tuple[Cell, Cell], ...]:
    """Every (start, goal) of free cells that are ``apart`` or more steps from each other on the
    shortest way, and ``ways`` or more routes. Raises UserError where there is none."""
    import networkx

    length = dict(networkx.all_pairs_shortest_path_length(_graph(MAZES[name], _STEPS, walls=False)))
    pairs = [(a, b) for a in sorted(length) for b in sorted(length[a]) if length[a][b] >= apart]
    if not pairs:
        farthest = max(steps for to in length.values() for steps in to.values())
        raise UserError(f"apart must be <= {farthest} in the maze {name}, got {apart}")
    if ways > 1:
        pairs = [pair for pair in pairs if len(routes(name, *pair)) >= ways]
    if not pairs:
        raise UserError(
            f"both_routes must be false in the maze {name}, where one way alone leads from any"
            f" start to a goal {apart} cells away"
        )
    return tuple(pairs)


def kind_of(maze: Maze, points_H2: np.ndarray) -> tuple[int, ...]:
    """By how many turns a line of points winds around each island more than the straight line
    between its ends does."""
    kind = []
    for middle_2 in islands(maze):
        from_H2 = points_H2 - middle_2
        angle_H = np.unwrap(np.arctan2(from_H2[:, 1], from_H2[:, 0]))
        straight = np.unwrap(angle_H[[0, -1]])
        wound = (angle_H[-1] - angle_H[0]) - (straight[1] - straight[0])
        kind.append(round(float(wound) / (2.0 * math.pi)))
    return tuple(kind)


def islands(maze: Maze) -> tuple[np.ndarray, ...]:
    """A place (2,) in each island of a maze: the middle of its first cell."""
    import networkx

    rows, columns = maze.walls.shape
    found = []
    for part in networkx.connected_components(_graph(maze, _TOUCHING, walls=True)):
        if all(0 < row < rows - 1 and 0 < column < columns - 1 for row, column in part):
            found.append(min(part))
    return tuple(centres(maze, [cell])[0] for cell in sorted(found))


def _graph(maze: Maze, steps: tuple[Cell, ...], walls: bool) -> Any:
    """Neighbouring cells that are walls, or that are free."""
    import networkx

    graph = networkx.Graph()
    chosen = {(int(row), int(column)) for row, column in np.argwhere(maze.walls == walls)}
    graph.add_nodes_from(sorted(chosen))
    for row, column in sorted(chosen):
        for down, right in steps:
            if (row + down, column + right) in chosen:
                graph.add_edge((row, column), (row + down, column + right))
    return graph
