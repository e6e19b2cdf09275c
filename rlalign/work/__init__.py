"""Pieces of sampling work: what a test-time method asks of whoever holds a policy and the rewards.

base.py    a piece (``Work``), who does pieces (``Engine``), what they cost (``Cost``), where rewards are asked (``Rewards``)
swarm.py   groups of weighted particles on their way through a chain
pieces.py  the common pieces: steps of a chain, a look at the clean picture, its score, the gradient of its score

A method decides; an engine computes. Rows are cut into pieces of a fixed size whoever does them, and noise is keyed, so a
result depends neither on how many workers there were nor on which of them died. May import diffusion, records,
``policies.base``; never a policy or a reward by name.
"""

from __future__ import annotations

from rlalign.work.base import Cost, Engine, NoScore, Rewards, Scores, Work, expand, part
from rlalign.work.pieces import (
    Advance,
    Look,
    Reached,
    Score,
    Seen,
    advance_rows,
    look_rows,
    reward_gradient,
    score_rows,
    see,
)
from rlalign.work.swarm import Swarm

__all__ = [
    "Advance",
    "Cost",
    "Engine",
    "Look",
    "NoScore",
    "Reached",
    "Rewards",
    "Score",
    "Scores",
    "Seen",
    "Swarm",
    "Work",
    "advance_rows",
    "expand",
    "look_rows",
    "part",
    "reward_gradient",
    "score_rows",
    "see",
]
