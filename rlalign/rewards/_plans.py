"""What rewards of plans share: the plans read off latents, their lines, and how far places lie from
walls.

A latent is a plan (B, 2, H): x and y of H way points on the scale of its maze. Its prompt's record
has the maze, the start and the goal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlalign.core.registry import UserError
from rlalign.data.mazes.maps import CELL, Maze, centres
from rlalign.data.mazes.simulator import Outcome, simulate
from rlalign.data.mazes.tasks import group_by_maze, read_task
from rlalign.rewards.base import Scorer

_LEAST_STEP = 1e-6  # metres


@dataclass(frozen=True, kw_only=True)
class Plans:
    """Plans in one maze, in metres."""

    maze: Maze
    points_BH2: torch.Tensor
    """(B, H, 2) float32, with gradients where the latents have them."""
    starts_B2: np.ndarray
    goals_B2: np.ndarray

    def run(self) -> Outcome:
        """What comes of them in the simulator; no gradient passes."""
        points_BH2 = self.points_BH2.detach().cpu().double().numpy()
        return simulate(self.maze, points_BH2, self.starts_B2, self.goals_B2)


def plan_scorer(title: str, score: Callable[[Plans], torch.Tensor]) -> Scorer:
    """The scorer that asks ``score`` about the plans of each maze."""

    def scorer(latents_B2H: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        shape = tuple(latents_B2H.shape)
        if len(shape) != 3 or shape[1] != 2 or shape[2] < 2:
            raise UserError(
                f"rewards.{title} needs plans of shape (B, 2, H), two or more way points each, got"
                f" latents of shape {shape}; take a policy that plans, such as tiny_planner"
            )
        tasks = [read_task(prompt) for prompt in prompts]
        found: dict[int, torch.Tensor] = {}
        for maze, rows in group_by_maze(tasks):
            plans = Plans(
                maze=maze,
                points_BH2=latents_B2H[rows].float().transpose(1, 2) * maze.scale,
                starts_B2=np.array([tasks[row].start for row in rows]),
                goals_B2=np.array([tasks[row].goal for row in rows]),
            )
            found |= zip(rows, score(plans), strict=True)
        return torch.stack([found[row] for row in range(len(tasks))])

    return scorer


def measure_length(points_BH2: torch.Tensor) -> torch.Tensor:
    """(B,) metres from the first way point to the last, along all others."""
    return _norm(points_BH2.diff(dim=1)).sum(dim=1)


def mean_along(points_BH2: torch.Tensor, value_BN: torch.Tensor) -> torch.Tensor:
    """(B,) mean along a plan's line of values at ``places_on`` it: each counts as much as its
    stretch is long; of a plan that stands still all count the same."""
    parts = value_BN.shape[1] // (points_BH2.shape[1] - 1)
    step_BH = _norm(points_BH2.diff(dim=1)) + _LEAST_STEP
    weight_BN = step_BH.repeat_interleave(parts, dim=1)
    return (weight_BN * value_BN).sum(dim=1) / weight_BN.sum(dim=1)


def places_on(points_BH2: torch.Tensor, parts: int) -> torch.Tensor:
    """(B, N, 2) the middles of ``parts`` equal stretches of every segment between two way points,
    in order."""
    middle_P = (torch.arange(parts, device=points_BH2.device) + 0.5) / parts
    steps_BH12 = points_BH2.diff(dim=1)[:, :, None]
    places_BHP2 = points_BH2[:, :-1, None] + middle_P[:, None] * steps_BH12
    return places_BHP2.flatten(1, 2)


def room_at(maze: Maze, places_BN2: torch.Tensor) -> torch.Tensor:
    """(B, N) metres from a place to the nearest wall; within a wall or outside of the map, minus
    the way to the nearest free cell."""
    to_wall_BN = _to_cells(centres(maze, np.argwhere(maze.walls)), places_BN2)
    to_free_BN = _to_cells(centres(maze, np.argwhere(~maze.walls)), places_BN2)
    return torch.where(to_free_BN > 0, -to_free_BN, to_wall_BN)


def _to_cells(middle_W2: np.ndarray, places_BN2: torch.Tensor) -> torch.Tensor:
    """(B, N) metres from a place to the nearest of some cells; 0 within one."""
    middle_W2_ = torch.from_numpy(middle_W2).to(places_BN2)
    apart_BNW2 = (places_BN2[:, :, None] - middle_W2_).abs() - CELL / 2
    return _norm(apart_BNW2.clamp(min=0.0)).amin(dim=2)


def _norm(vector_2: torch.Tensor) -> torch.Tensor:
    """Euclidean norm over the last axis, whose gradient at 0 is 0."""
    square = vector_2.square().sum(dim=-1)
    return torch.where(square > 0, square.clamp(min=1e-24).sqrt(), torch.zeros_like(square))
