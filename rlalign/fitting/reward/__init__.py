"""Fitting a Bradley-Terry reward on preference pairs: an open_clip model, from the settings to a
folder that scores.

    pairs (files, or simulated) -> split by prompt -> contrastive warm-up (optional) -> loss on
    pairs -> held-out report

settings.py  what a YAML file says          simulate.py  pairs of a policy's samples under a hidden
utility losses.py    what the two stages minimise   stage.py     optimiser, schedule, state; which
layers are frozen fitting.py   the run, and what it resumes   report.py    accuracy, calibration,
fit.json and fit.html

Everything random is keyed by (seed, purpose, update): a run that was stopped anywhere ends in the
same weights, bit for bit, as one that was not (same machine, same threads). May import data,
networks, diffusion and the bases of the shelves; another loss is a function in ``losses.py`` and a
line in ``losses.pair_loss``.
"""

from __future__ import annotations

from rlalign.fitting.reward.fitting import fit_reward
from rlalign.fitting.reward.settings import FitReward

__all__ = ["FitReward", "fit_reward"]
