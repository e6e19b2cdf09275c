"""Strengths against choix, finite differences and known truths."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.ballots import strengths
from rlalign.ballots.strengths import fit_strengths, votes_needed, win_matrix

TRUE = np.array([0.0, 0.3, -0.4, 0.9, 0.5])
LEFT, THRESHOLD = 0.35, 0.4
ANNOTATORS, VOTES, SIMULATIONS = 30, 40, 400


def chances(strength: np.ndarray, left: float, threshold: float) -> np.ndarray:
    """(N, N, 3) probabilities of left, right and tie."""
    d = strength[:, None] - strength[None, :] + left
    won = 1 / (1 + np.exp(threshold - d))
    lost = 1 / (1 + np.exp(threshold + d))
    return np.stack([won, lost, 1 - won - lost], axis=-1)


def simulate(rng: np.random.Generator, *, simulations: int, copies: int = 1) -> np.ndarray:
    """(S, A, N, N, 3): votes of people who were shown random pairs; ``copies`` of each vote."""
    count = len(TRUE)
    shape = (simulations, ANNOTATORS, VOTES)
    first = rng.integers(count, size=shape)
    second = (first + rng.integers(1, count, size=shape)) % count
    shares = chances(TRUE, LEFT, THRESHOLD)[first, second].cumsum(axis=-1)
    chosen = (rng.random(shape)[..., None] > shares).sum(axis=-1)
    counts = np.zeros((simulations, ANNOTATORS, count, count, 3))
    simulation, annotator, _ = np.indices(shape)
    np.add.at(counts, (simulation, annotator, first, second, chosen), copies)
    return counts


@pytest.mark.parametrize("copies", [1, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(copies: int) -> None:
    """400 simulations, seed 0: 93 to 97 % for the strengths together and for the left intercept,
    also where each vote is there three times, which independent votes would not be. One parameter's
    share has a standard deviation of 1.1 %; its margin is three of them."""
    counts = simulate(np.random.default_rng(0), simulations=SIMULATIONS, copies=copies)
    fitted = fit_strengths(counts, ridge=1e-6)
    low, high = fitted.interval()
    held = ((low <= TRUE) & (high >= TRUE)).mean(axis=0)[1:]
    assert 0.93 <= held.mean() <= 0.97
    assert np.all(abs(held - 0.95) < 0.033)

    low, high = fitted.left_interval()
    assert 0.93 <= ((low <= LEFT) & (high >= LEFT)).mean() <= 0.97
    assert np.median(fitted.widening[:, 1:]) == pytest.approx(copies, rel=0.15)
    if copies > 1:  # intervals of independent votes hold it far too seldom
        half = 1.96 * fitted.strength_error[:, 1:] / np.sqrt(fitted.widening[:, 1:])
        assert (abs(fitted.strength - TRUE)[:, 1:] <= half).mean() < 0.8


def test_a_left_bias_is_found_and_none_is_not_found() -> None:
    counts = simulate(np.random.default_rng(1), simulations=1)[0]
    low, _ = fit_strengths(counts).left_interval()
    assert low > 0
    mirrored = counts + np.swapaxes(counts, 1, 2)[..., [1, 0, 2]]  # each vote, seen in a mirror
    assert abs(fit_strengths(mirrored).left) < 1e-9


def test_without_ties_and_sides_it_is_the_fit_of_choix() -> None:
    import choix

    counts = simulate(np.random.default_rng(2), simulations=1)[0]
    counts[..., 2] = 0
    counts = counts + np.swapaxes(counts, 1, 2)[..., [1, 0, 2]]
    games = [
        (winner, loser)
        for winner in range(len(TRUE))
        for loser in range(len(TRUE))
        for _ in range(int(counts[:, winner, loser, 0].sum()))
    ]
    theirs = choix.opt_pairwise(len(TRUE), games, alpha=0.0, tol=1e-12)
    ours = fit_strengths(counts, ridge=0.0)
    np.testing.assert_allclose(ours.strength, theirs - theirs[0], atol=1e-6)
    assert ours.threshold == 0


def test_the_slope_and_the_information_are_derivatives() -> None:
    counts = simulate(np.random.default_rng(3), simulations=1)[0].sum(axis=0)
    at = np.array([0.1, 0.2, -0.3, 0.4, 0.0, 0.2, 0.5])
    ties = np.array(True)
    shift = np.eye(len(at)) * 1e-5

    def value(parameters: np.ndarray) -> float:
        return float(strengths._log_likelihood(parameters, counts, 0.0))

    def slope(parameters: np.ndarray) -> np.ndarray:
        return strengths._slope(parameters, counts, ties)

    by_value = [(value(at + one) - value(at - one)) / 2e-5 for one in shift]
    np.testing.assert_allclose(slope(at), by_value, rtol=1e-6, atol=1e-4)
    by_slope = np.array([(slope(at + one) - slope(at - one)) / 2e-5 for one in shift])
    information = strengths._information(at, counts, 0, 0.0, ties)
    free = slice(1, None)  # the anchor is held
    np.testing.assert_allclose(-by_slope[free, free], information[free, free], rtol=1e-5, atol=1e-4)


def test_one_that_never_lost_stays_finite() -> None:
    counts = np.zeros((2, 3, 3, 3))
    counts[:, 2, 0, 0] = counts[:, 2, 1, 0] = counts[:, 0, 1, 0] = counts[:, 1, 0, 0] = 5
    counts += np.swapaxes(counts, 1, 2)[..., [1, 0, 2]]  # each vote, seen in a mirror
    fitted = fit_strengths(counts)
    assert 3 < fitted.strength[2] < 30
    assert np.isfinite(fitted.strength_error).all()


def test_nothing_voted_says_nothing() -> None:
    fitted = fit_strengths(np.zeros((1, 3, 3, 3)))
    np.testing.assert_array_equal(fitted.strength, 0)
    assert fitted.strength_error[1] > 10


@pytest.mark.parametrize(
    ("share", "votes"), [(0.55, 783), (0.60, 194), (0.65, 85), (0.70, 47), (0.75, 29), (0.3, 47)]
)
def test_votes_that_a_win_rate_needs(share: float, votes: int) -> None:
    """Checked by simulation too: with so many votes the test finds it about 80 times in 100."""
    assert round(votes_needed(share)) == votes
    won = np.random.default_rng(0).binomial(votes, share, size=20_000) / votes
    found = abs(won - 0.5) > 1.96 * 0.5 / votes**0.5
    assert found.mean() == pytest.approx(0.8, abs=0.06)


def test_wins_count_whatever_the_side() -> None:
    counts = np.zeros((1, 2, 2, 3))
    counts[0, 0, 1] = (3, 1, 2)
    counts[0, 1, 0] = (4, 0, 0)
    np.testing.assert_array_equal(win_matrix(counts), [[0, 4], [6, 0]])
