"""Pieces of work, and who does them: what a run and a test-time method ask of whoever holds a
policy and the rewards.

base.py    a piece (``Work``), who does pieces (``Engine``), what they cost (``Cost``), where
           rewards are asked (``Rewards``)
swarm.py   groups of weighted particles on their way through a chain
shared.py  one policy for pieces on several threads: the next asks while one waits for a score
local.py   pieces on threads of this process; the rewards where they are loaded (``rlalign.runtime``
           has both on Ray)
chains.py  whole chains as one function of their noises: values and gradients
particles.py  weights, effective sample size, resampling
pieces.py  the common pieces: steps of a chain, a look at the clean picture, its score, the gradient
           of its score, and a unit of a round

A method decides; an engine computes. Rows are cut into pieces of a fixed size whoever does them,
and noise is keyed, so a result depends neither on how many workers there were nor on which of them
died. May import core, diffusion and ``policies.base``; never a policy or a reward by name.
"""

from __future__ import annotations

from rlalign.engine.base import (
    Cost,
    Engine,
    NoScore,
    Rewards,
    Scores,
    Work,
    WorkResult,
    expand,
    join_scores,
)
from rlalign.engine.pieces import (
    Advance,
    Look,
    Position,
    Score,
    View,
    advance_and_score_rows,
    advance_rows,
    join_views,
    look_rows,
    pull_on,
    reward_gradient,
    score_rows,
    see,
)
from rlalign.engine.swarm import Swarm, flat_rows

__all__ = [
    "Advance",
    "Cost",
    "Engine",
    "Look",
    "NoScore",
    "Position",
    "Rewards",
    "Score",
    "Scores",
    "Swarm",
    "View",
    "Work",
    "WorkResult",
    "advance_and_score_rows",
    "advance_rows",
    "expand",
    "flat_rows",
    "join_scores",
    "join_views",
    "look_rows",
    "pull_on",
    "reward_gradient",
    "score_rows",
    "see",
]
