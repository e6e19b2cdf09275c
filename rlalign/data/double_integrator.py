"""A double integrator under a linear controller with noise: the embedded task whose every answer is
known in closed form.

A state is a place and a velocity, a control the force on a unit mass, for ``STEP`` seconds each:
s' = A s + B u. The controller's u = -K s + SPREAD * noise is a linear-quadratic regulator's with
a control cost that is too large, so its plans are good and can be better. A plan (3, H) is the
place, the velocity and the control of H moments; given its start it is jointly Gaussian.

NumPy alone. Letters: B plans, H moments, D = 3 H numbers of a plan, channel by channel.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlalign.core.prompts import Prompt, record_of
from rlalign.core.registry import UserError

STEP = 0.5
"""Seconds between two moments."""
A_22 = np.array([[1.0, STEP], [0.0, 1.0]])
B_2 = np.array([STEP**2 / 2.0, STEP])
SPREAD = 0.5
"""Standard deviation of the controller's noise."""
COST = (1.0, 0.1, 0.1)
"""Cost of a squared place, velocity and control: what a plan is to keep small."""
CAUTION = 1.0
"""The control cost that the base controller is best for."""


def regulate(horizon: int, cost: Sequence[float] = COST) -> np.ndarray:
    """(H, 2) gains of the regulator that is best for a cost over H moments: u = -K s, by the
    Riccati recursion. The last control moves nothing any more, and is 0."""
    q_22 = np.diag(np.asarray(cost[:2], dtype=float))
    value_22 = q_22
    gains = [np.zeros(2)]
    for _ in range(horizon - 1):
        gain_2 = B_2 @ value_22 @ A_22 / (cost[2] + B_2 @ value_22 @ B_2)
        value_22 = q_22 + A_22.T @ value_22 @ (A_22 - np.outer(B_2, gain_2))
        gains.append(gain_2)
    return np.stack(gains[::-1])


def follow(gains_H2: np.ndarray, starts_B2: np.ndarray, noise_BH: np.ndarray) -> np.ndarray:
    """(B, 3, H) plans of a controller from starts, with what is added to its controls."""
    states_B2 = np.asarray(starts_B2, dtype=float)
    moments = []
    for gain_2, noise_B in zip(gains_H2, noise_BH.T, strict=True):
        control_B = noise_B - states_B2 @ gain_2
        moments.append(np.column_stack([states_B2, control_B]))
        states_B2 = states_B2 @ A_22.T + control_B[:, None] * B_2
    return np.stack(moments, axis=2)


@dataclass(frozen=True, kw_only=True)
class JointGaussian:
    """Plans of the base controller, of which ``held`` numbers are given: their mean is
    ``map_DN`` times the given states, start first, and their covariance the same for all."""

    map_DN: np.ndarray
    covariance_DD: np.ndarray
    held_D: np.ndarray
    """(D,) bool: numbers that the given states fix."""


@functools.cache
def joint_gaussian(horizon: int, *, to_goal: bool) -> JointGaussian:
    """The base controller's plans from a start, or those of them that end in a goal: conditioned
    on it, so their mean is the smoother's."""
    gains_H2 = regulate(horizon, (*COST[:2], CAUTION))
    still_BH = np.zeros((2, horizon))
    map_D2 = follow(gains_H2, np.eye(2), still_BH).reshape(2, -1).T
    noise_HH = SPREAD * np.eye(horizon)
    factor_DH = follow(gains_H2, np.zeros((horizon, 2)), noise_HH).reshape(horizon, -1).T
    covariance_DD = factor_DH @ factor_DH.T
    held_D = np.zeros(3 * horizon, dtype=bool)
    held_D[[0, horizon]] = True
    if not to_goal:
        return JointGaussian(map_DN=map_D2, covariance_DD=covariance_DD, held_D=held_D)

    # a Gaussian given two of its numbers
    last = [horizon - 1, 2 * horizon - 1]
    gain_D2 = covariance_DD[:, last] @ np.linalg.inv(covariance_DD[np.ix_(last, last)])
    map_D4 = np.concatenate([map_D2 - gain_D2 @ map_D2[last], gain_D2], axis=1)
    held_D[last] = True
    return JointGaussian(
        map_DN=map_D4, covariance_DD=covariance_DD - gain_D2 @ covariance_DD[last], held_D=held_D
    )


# --- prompts -------------------------------------------------------------------------------------


def state_prompt(start: Sequence[float], goal: Sequence[float] | None = None) -> Prompt:
    """ "from 1.20 at -0.50" (metres, m/s), with " to 0.00 at 0.00" where there is a goal, and the
    record that ``read_states`` reads."""
    said = "from {:.2f} at {:.2f}".format(*start)
    record: dict[str, Any] = {"start": [*start]}
    if goal is not None:
        said += " to {:.2f} at {:.2f}".format(*goal)
        record["goal"] = [*goal]
    return Prompt(said, record)


def read_states(prompt: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The start (2,) and the goal, where there is one, of a prompt's record. Raises UserError where
    there is no start, and for what is no state."""
    record = record_of(prompt)
    start = _state(record, "start", prompt)
    if start is None:
        raise UserError(
            f"a prompt must have a record with a start (place and velocity), got {prompt!r} with"
            f" {', '.join(record) or 'none'}; take prompts: {{name: states}}, or a file with"
            " records"
        )
    return start, _state(record, "goal", prompt)


def _state(record: Mapping[str, Any], name: str, prompt: str) -> np.ndarray | None:
    given = record.get(name)
    if given is None:
        return None
    try:
        found = np.asarray(given, dtype=float)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape != (2,) or not np.isfinite(found).all():
        raise UserError(
            f"the {name} of a prompt must be two numbers, a place and a velocity, got {given!r}"
            f" with {str(prompt)!r}"
        )
    return found
