"""Whether a plan leads to its goal, found out by following it."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Space
from rlalign.data.mazes.demonstrations import expert
from rlalign.data.mazes.simulator import simulate
from rlalign.rewards._plans import Plans, plan_scorer
from rlalign.rewards.base import Reward, Scorer


class Reach(Reward):
    """Whether the ball that follows a plan in its maze reaches the goal in the maze's time, 0 or 1,
    or how quickly.

    The plan is run in a simulator with PointMaze's dynamics. A plan with numbers that are not
    finite has no score.

    Source: the success of PointMaze in Gymnasium-Robotics; the normalised score of D4RL (Fu 2020,
    arXiv:2004.07219), against rlalign's own expert.
    """

    sees: ClassVar[Space] = "latent"

    measure: Literal["success", "time", "normalised"] = Field(
        default="success",
        description=(
            "success: 1 where the goal is reached; time: the share of the maze's time that is left"
            " then; normalised: that over what the shortest way leaves, about 0 to 1"
        ),
    )

    def load(self, device: str) -> Scorer:
        """The scorer; it works on the CPU wherever the latents are."""
        return plan_scorer(self.title, self._score)

    def _score(self, plans: Plans) -> torch.Tensor:
        outcome = plans.run()
        score_B = torch.from_numpy(outcome.reached_B.astype("float32"))
        if self.measure != "success":
            score_B = score_B * _time_left(plans, outcome.seconds_B)
        if self.measure == "normalised":
            starts_B2, goals_B2 = plans.starts_B2, plans.goals_B2
            shortest_BH2 = expert(plans.maze, starts_B2, goals_B2, plans.points_BH2.shape[1])
            best = simulate(plans.maze, shortest_BH2, starts_B2, goals_B2)
            score_B = score_B / _time_left(plans, best.seconds_B)
        is_sound_B = plans.points_BH2.detach().cpu().isfinite().flatten(1).all(dim=1)
        return torch.where(is_sound_B, score_B, torch.nan)


def _time_left(plans: Plans, seconds_B: np.ndarray) -> torch.Tensor:
    """(B,) share of the maze's time that is left after some seconds."""
    return torch.from_numpy(1.0 - seconds_B / plans.maze.seconds).float()
