"""Starts and goals as prompts, and the source of prompts that draws them."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.core.prompts import Prompt
from rlalign.core.registry import UserError, build
from rlalign.data.mazes.maps import MAZES, cells_of, is_free
from rlalign.data.mazes.routes import routes
from rlalign.data.mazes.tasks import Task, group_by_maze, read_task
from rlalign.data.prompts.base import Prompts

TASK = Task(maze=MAZES["umaze"], start=(-1.0, 0.9), goal=(1.1, -1.0))


def mazes(**settings: object) -> Prompts:
    found = build("prompts", {"name": "mazes", **settings})
    assert isinstance(found, Prompts)
    return found


def test_a_prompt_says_its_task_and_holds_it() -> None:
    assert TASK.prompt == "from (-1.00, 0.90) to (1.10, -1.00)"
    assert read_task(TASK.prompt) == TASK


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maze": "ring"}, "maze must be one of umaze, medium, large, got 'ring'"),
        ({"start": [0.0, 0.0]}, r"the start .* a free place in the maze umaze .* \[0.0, 0.0\]"),
        ({"goal": [9.0, 0.0]}, "the goal of a plan's prompt must be two numbers"),
        ({"goal": [1.0]}, "the goal of a plan's prompt must be two numbers"),
        ({"goal": [1.0, float("inf")]}, "the goal of a plan's prompt must be two numbers"),
    ],
)
def test_a_wrong_record_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_task(Prompt("there", {**TASK.prompt.record, **changes}))


def test_a_prompt_without_a_record_is_refused() -> None:
    with pytest.raises(UserError, match="must have a record with maze, start and goal, got 'a'"):
        read_task("a")


def test_tasks_are_grouped_by_their_mazes() -> None:
    other = Task(maze=MAZES["medium"], start=(-2.5, 2.5), goal=(2.5, -2.5))
    groups = group_by_maze([TASK, other, TASK])
    assert [(maze.name, rows) for maze, rows in groups] == [("umaze", [0, 2]), ("medium", [1])]


@pytest.mark.parametrize(("maze", "apart"), [("umaze", 3), ("medium", 5)])
def test_prompts_are_free_places_apart_and_those_held_out_are_others(maze: str, apart: int) -> None:
    source = mazes(maze=maze, apart=apart)
    train, held_out = source.pool(), [prompt for _, prompt in source.held_out(256)]
    assert (len(set(train)), len(set(held_out))) == (1024, 256)
    assert not set(train) & set(held_out)
    for prompt in (*train[:50], *held_out[:50]):
        task = read_task(prompt)
        ends = np.array([task.start, task.goal])
        assert is_free(task.maze, ends, 0.2).all()
        start, goal = (tuple(map(int, cell)) for cell in cells_of(task.maze, ends))
        assert len(routes(maze, start, goal)[0]) > apart
    assert mazes(maze=maze, apart=apart, limit=7).pool() == train[:7]


def test_prompts_may_have_two_routes() -> None:
    for prompt in mazes(maze="medium", both_routes=True).pool()[:40]:
        task = read_task(prompt)
        start, goal = cells_of(task.maze, np.array([task.start, task.goal])).tolist()
        assert len(routes("medium", tuple(start), tuple(goal))) == 2


def test_what_a_maze_has_not_is_refused() -> None:
    with pytest.raises(UserError, match="both_routes must be false in the maze umaze"):
        mazes(both_routes=True)
    with pytest.raises(UserError, match="apart must be <= 6 in the maze umaze, got 9"):
        mazes(apart=9)
