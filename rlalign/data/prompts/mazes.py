"""Starts and goals in a maze."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from pydantic import Field, model_validator

from rlalign.core.prompts import Prompt
from rlalign.data.mazes.demonstrations import random_ends
from rlalign.data.mazes.maps import MAZES, MazeName
from rlalign.data.mazes.routes import cell_pairs
from rlalign.data.mazes.tasks import Task
from rlalign.data.prompts.base import Prompts, first_of
from rlalign.data.splits import is_held_out
from rlalign.diffusion.noise import generator

COUNT = 1024
"""Starts and goals that are trained on."""
_HELD_OUT = 256


class Mazes(Prompts):
    """Starts and goals in a maze, such as "from (-1.02, 0.90) to (0.98, -1.10)" in metres; those
    for evaluation never occur in training.

    Each prompt has a record with "maze", "start" and "goal".

    Source: PointMaze of Gymnasium-Robotics, ``rlalign/data/mazes/``.
    """

    maze: MazeName = Field(default="umaze", description="which of PointMaze's mazes")
    apart: int = Field(
        default=3, ge=1, description="cells that lie between a start and its goal, at least"
    )
    both_routes: bool = Field(
        default=False, description="only where a way on each side of a wall leads to the goal"
    )
    limit: int = Field(
        default=0,
        ge=0,
        le=COUNT,
        description="train on a fixed choice of this many starts and goals; 0 is all of them",
    )

    @model_validator(mode="after")
    def _exists(self) -> Mazes:
        cell_pairs(self.maze, self.apart, 1 + self.both_routes)
        return self

    def pool(self) -> Sequence[str]:
        everything = _tasks("train", self.maze, self.apart, self.both_routes)
        return everything[: self.limit or None]

    def held_out(self, count: int) -> list[tuple[int, str]]:
        return first_of(_tasks("held_out", self.maze, self.apart, self.both_routes), count)


@lru_cache
def _tasks(split: str, name: str, apart: int, both_routes: bool) -> tuple[Prompt, ...]:
    """The prompts of a split, in a fixed order."""
    count = COUNT if split == "train" else _HELD_OUT
    found: dict[Prompt, None] = {}
    for prompt in _draw(name, apart, both_routes):
        if is_held_out(prompt) == (split == "held_out"):
            found.setdefault(prompt)
        if len(found) == count:
            break
    return tuple(found)


def _draw(name: str, apart: int, both_routes: bool) -> Iterator[Prompt]:
    """Prompts without end, places rounded to centimetres."""
    maze = MAZES[name]
    rng = generator("mazes", name, apart, int(both_routes))
    while True:
        ends_22 = random_ends(maze, rng, apart, 1 + both_routes).round(2)
        (a, b), (c, d) = ends_22.tolist()
        yield Task(maze=maze, start=(a, b), goal=(c, d)).prompt
