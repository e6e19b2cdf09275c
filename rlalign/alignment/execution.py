"""A planner's plans followed in the simulator, with plans anew on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlalign.core.registry import UserError
from rlalign.data.mazes.simulator import Disturb, Outcome, simulate
from rlalign.data.mazes.tasks import Task, group_by_maze, read_task

if TYPE_CHECKING:
    from rlalign.policies.base import Policy


def execute_plans(
    policy: Policy,
    prompts: Sequence[str],
    *,
    replan_every: int = 0,
    disturb: Disturb = lambda step, place_B2: place_B2,
    seconds: float | None = None,
    **settings: Any,
) -> Outcome:
    """Plans for every prompt and lets a ball follow each plan, as the reward ``reach`` does.

    ``replan_every`` is in the simulator's steps of 0.01 s: after so many the planner is asked for
    plans from where the balls are to their goals, with the same seed; 0 follows the first plans to
    their end. ``disturb`` carries the balls elsewhere, ``seconds`` are the maze's where left out,
    and ``settings`` are those of ``Policy.sample``, such as ``steps``, ``eta`` and ``seed``. Raises
    UserError for prompts without a start and a goal, or of several mazes.

    Source: replanning is receding-horizon control; Janner 2022, arXiv:2205.09991 (Diffuser) plans
    so.
    """
    if replan_every < 0:
        raise UserError(
            f"execute_plans: replan_every must be 0 (one plan) or more, got {replan_every}"
        )
    tasks = [read_task(prompt) for prompt in prompts]
    mazes = group_by_maze(tasks)
    if len(mazes) != 1:
        raise UserError(
            "execute_plans: prompts must be of one maze, got"
            f" {', '.join(maze.name for maze, _ in mazes) or 'no prompts'}"
        )
    maze = mazes[0][0]
    goals_B2 = np.array([task.goal for task in tasks])

    def plan_from(place_B2: np.ndarray) -> np.ndarray:
        asked = [
            Task(maze=maze, start=(x, y), goal=task.goal).prompt
            for (x, y), task in zip(place_B2.tolist(), tasks, strict=True)
        ]
        plans_B2H = policy.sample(asked, output="latents", **settings)
        return plans_B2H.double().cpu().numpy().transpose(0, 2, 1) * maze.scale

    def plan_anew(step: int, place_B2: np.ndarray) -> np.ndarray | None:
        is_due = replan_every > 0 and step > 0 and step % replan_every == 0
        return plan_from(place_B2) if is_due else None

    starts_B2 = np.array([task.start for task in tasks])
    return simulate(
        maze,
        plan_from(starts_B2),
        starts_B2,
        goals_B2,
        seconds=seconds,
        disturb=disturb,
        plan_anew=plan_anew,
    )
