"""A start and a goal in a maze, and the prompt that says them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlalign.core.prompts import Prompt, record_of
from rlalign.core.registry import UserError
from rlalign.data.mazes.maps import Maze, find_maze, is_free

Place = tuple[float, float]
"""x and y in metres."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """From where to where in which maze."""

    maze: Maze
    start: Place
    goal: Place

    @property
    def prompt(self) -> Prompt:
        """ "from (-1.02, 0.90) to (0.98, -1.10)" with the record that ``read_task`` reads."""
        (a, b), (c, d) = self.start, self.goal
        record = {"maze": self.maze.name, "start": [a, b], "goal": [c, d]}
        return Prompt(f"from ({a:.2f}, {b:.2f}) to ({c:.2f}, {d:.2f})", record)


def read_task(prompt: str) -> Task:
    """The task that a prompt's record holds. Raises UserError where there is none, for an unknown
    maze, and for a place that is no free one."""
    record = record_of(prompt)
    if not {"maze", "start", "goal"} <= record.keys():
        raise UserError(
            f"a plan's prompt must have a record with maze, start and goal, got {prompt!r} with"
            f" {', '.join(record) or 'none'}; take prompts: {{name: mazes}}, or a file with records"
        )
    maze = find_maze(record["maze"])
    return Task(maze=maze, start=_place(record, "start", maze), goal=_place(record, "goal", maze))


def _place(record: Mapping[str, Any], name: str, maze: Maze) -> Place:
    try:
        x, y = map(float, record[name])
    except (TypeError, ValueError):
        x = y = float("nan")
    if not np.isfinite([x, y]).all() or not is_free(maze, np.array([x, y])):
        raise UserError(
            f"the {name} of a plan's prompt must be two numbers, a free place in the maze"
            f" {maze.name} in metres, got {record[name]!r}"
        )
    return x, y


def group_by_maze(tasks: Sequence[Task]) -> list[tuple[Maze, list[int]]]:
    """Every maze of some tasks with the numbers of those in it."""
    rows: dict[str, list[int]] = {}
    for number, task in enumerate(tasks):
        rows.setdefault(task.maze.name, []).append(number)
    return [(tasks[numbers[0]].maze, numbers) for numbers in rows.values()]
