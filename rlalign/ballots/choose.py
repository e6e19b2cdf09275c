"""Which of many pairs is asked next, from what a fitted reward predicts for each.

Each rule scores pairs; the pair of the highest score is asked, but a stated share of ballots is
drawn at random, so that every pair has a probability that is known and not 0: votes can be weighted
by its inverse wherever the choice must not matter.

To learn a reward, ``fisher`` is the rule to take: in simulation it reaches the accuracy of random
choice with 0.5 to 0.75 of its votes, where ``uncertain`` saves little of noisy votes or nothing
(``benchmarks/NOTES.md``). ``gap`` is for pairs that a policy is trained on.

Letters: N pairs, D features. ``margin_N`` is the fitted reward of a pair's first picture minus that
of its second, in log-odds; ``features_ND`` the difference of their features under the reward's last
layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RULES = ("random", "uncertain", "fisher", "gap")


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A chosen pair."""

    index: int
    propensity: float
    """The probability that this one was chosen."""
    rule: str
    """The rule by which: ``random`` where the random share drew it."""


def pick(
    score_N: np.ndarray, rule: str, rng: np.random.Generator, random_share: float = 0.2
) -> Pick:
    """The best by score, or with probability ``random_share`` any of them. Equal scores are drawn
    among."""
    count = len(score_N)
    best = np.flatnonzero(score_N == score_N.max())
    at_random = rng.random() < random_share
    index = int(rng.integers(count) if at_random else rng.choice(best))
    propensity = random_share / count + (1 - random_share) * (index in best) / len(best)
    return Pick(index=index, propensity=float(propensity), rule="random" if at_random else rule)


def uncertain(margin_N: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """What a vote tells about its margin: the Fisher information under Rao and Kupper's ties.

    Without ties (``threshold`` 0) that is p (1 - p), highest for a margin of 0. With ties such a
    pair would mostly bring one, and the highest are at a margin of about the threshold.

    Source: Rao & Kupper 1967, doi:10.1080/01621459.1967.10482901, and Lewis & Gale 1994,
    doi:10.1007/978-1-4471-2099-5_1 (uncertainty sampling).
    """
    left_N = _sigmoid(margin_N - threshold)
    right_N = _sigmoid(-margin_N - threshold)
    return (1 - left_N) * (1 - right_N) * (left_N + right_N)


def gap(margin_N: np.ndarray) -> np.ndarray:
    """How sure the reward is: pairs to train on, rather than to learn the reward from."""
    return abs(margin_N)


def fisher(
    margin_N: np.ndarray, features_ND: np.ndarray, inverse_DD: np.ndarray, threshold: float = 0.0
) -> np.ndarray:
    """What the determinant of the information grows by: ``uncertain`` times f' H^-1 f.

    ``inverse_DD`` is the inverse H^-1 of the information so far (``Information``).

    Source: D-optimal design; Chaloner & Verdinelli 1995, doi:10.1214/ss/1177009939, section 4.
    """
    reach_N = (features_ND @ inverse_DD * features_ND).sum(axis=1)
    return uncertain(margin_N, threshold) * reach_N


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


class Information:
    """The inverse of the information H = prior + sum of w f f', kept as pairs are dealt; w is what
    a vote tells about its margin (``uncertain``).

    Adding a pair as it is dealt, before its vote is there, keeps the next ones from being like it.
    """

    def __init__(self, dimensions: int, prior: float = 1.0) -> None:
        self.inverse_DD = np.eye(dimensions) / prior

    def add(self, features_D: np.ndarray, weight: float) -> None:
        """Adds a pair by the formula of Sherman and Morrison (1950)."""
        reach_D = self.inverse_DD @ features_D
        grown = 1 + weight * features_D @ reach_D
        self.inverse_DD -= np.outer(reach_D, reach_D) * (weight / grown)


def stay(winner: str, waiting: list[str]) -> tuple[str, str] | None:
    """The winner's next pair: it stays, and the next picture that waits comes; None where none
    does."""
    others = [uid for uid in waiting if uid != winner]
    return (winner, others[0]) if others else None
