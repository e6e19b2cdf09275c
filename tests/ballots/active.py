"""How many votes a rule of choice saves: simulated votes on pairs by a linear reward.

Letters: S simulations side by side, N pairs that may be asked, T held-out pairs, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlalign.ballots._dealing import WINDOW
from rlalign.ballots.choose import Information, fisher, pick, uncertain

PRIOR = 1.0
"""Precision of the fitted weights' prior."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Pairs, and the reward that people vote by."""

    pairs_ND: np.ndarray
    """Differences of features."""
    held_out_TD: np.ndarray
    weights_D: np.ndarray


def make_world(
    rng: np.random.Generator, *, decay: float, people_agree: float, dimensions: int = 8
) -> World:
    """1,500 pairs whose features have standard deviations 1, 2^-decay, 3^-decay ... (0: all alike),
    with votes so noisy that two people agree on about ``people_agree`` of pairs."""
    spread_D = np.arange(1.0, dimensions + 1) ** -decay
    pairs_ND = rng.normal(size=(1500, dimensions)) * spread_D
    held_out_TD = rng.normal(size=(1000, dimensions)) * spread_D
    weights_D = rng.normal(size=dimensions)
    gap_T = held_out_TD @ weights_D

    # scale the reward until people agree so often
    low, high = 0.01, 100.0
    for _ in range(40):
        scale = (low * high) ** 0.5
        p = _sigmoid(scale * gap_T)
        agree = (p**2 + (1 - p) ** 2).mean()
        low, high = (scale, high) if agree < people_agree else (low, scale)
    return World(pairs_ND=pairs_ND, held_out_TD=held_out_TD, weights_D=scale * weights_D)


def accuracies(
    world: World, rule: str, rng: np.random.Generator, votes: int, every: int = 10
) -> np.ndarray:
    """Held-out pairs that the fitted reward orders rightly, after each ``every`` votes."""
    dimensions = len(world.weights_D)
    fitted_D = np.zeros(dimensions)
    information = Information(dimensions, PRIOR)
    waiting = np.arange(len(world.pairs_ND))  # the first of them are chosen among
    asked: list[np.ndarray] = []
    said: list[float] = []
    right = world.held_out_TD @ world.weights_D > 0
    found = []
    for number in range(votes):
        pairs_ND = world.pairs_ND[waiting[:WINDOW]]
        margin_N = pairs_ND @ fitted_D
        if rule == "fisher":
            score_N = fisher(margin_N, pairs_ND, information.inverse_DD)
        else:
            score_N = uncertain(margin_N) if rule == "uncertain" else np.zeros(len(pairs_ND))
        index = pick(score_N, rule, rng).index
        information.add(pairs_ND[index], float(uncertain(margin_N[index])))
        asked.append(pairs_ND[index])
        said.append(float(rng.random() < _sigmoid(pairs_ND[index] @ world.weights_D)))
        waiting = np.delete(waiting, index)
        if (number + 1) % every == 0:
            fitted_D, information.inverse_DD = fit(np.array(asked), np.array(said), fitted_D)
            found.append(((world.held_out_TD @ fitted_D > 0) == right).mean())
    return np.array(found)


def fit(
    pairs_ND: np.ndarray, won_N: np.ndarray, start_D: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(weights, inverse information) of the most probable linear reward, by Newton's steps that are
    halved until the value rises."""

    def value(weights_D: np.ndarray) -> float:
        margin_N = (2 * won_N - 1) * (pairs_ND @ weights_D)
        return float(-np.logaddexp(0, -margin_N).sum() - PRIOR / 2 * weights_D @ weights_D)

    weights_D = start_D
    for _ in range(30):
        p_N = _sigmoid(pairs_ND @ weights_D)
        slope_D = pairs_ND.T @ (won_N - p_N) - PRIOR * weights_D
        weighed_ND = pairs_ND * (p_N * (1 - p_N))[:, None]
        inverse_DD = np.linalg.inv(weighed_ND.T @ pairs_ND + PRIOR * np.eye(len(start_D)))
        step_D = inverse_DD @ slope_D
        while value(weights_D + step_D) < value(weights_D) - 1e-9:
            step_D = step_D / 2
        weights_D = weights_D + step_D
        if abs(step_D).max() < 1e-4:
            break
    return weights_D, inverse_DD


def mean_curve(
    rule: str, *, decay: float, people_agree: float, votes: int, simulations: int
) -> np.ndarray:
    """``accuracies`` in the mean over simulations, each with a world of its own."""
    curves = []
    for seed in range(simulations):
        world = make_world(np.random.default_rng(seed), decay=decay, people_agree=people_agree)
        curves.append(accuracies(world, rule, np.random.default_rng(1000 + seed), votes))
    return np.mean(curves, axis=0)


def votes_to_reach(accuracy: np.ndarray, goal: float, every: int = 10) -> float:
    """Votes until the mean curve reaches the goal and stays, between its points in proportion; inf
    where it does not."""
    below = np.flatnonzero(accuracy < goal)
    last = -1 if not len(below) else int(below[-1])
    if last == len(accuracy) - 1:
        return float("inf")
    if last < 0:
        return float(every)
    part = (goal - accuracy[last]) / (accuracy[last + 1] - accuracy[last])
    return every * (last + 1 + float(part))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
