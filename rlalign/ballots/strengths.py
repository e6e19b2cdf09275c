"""How strong each contestant is, from who was preferred to whom: Bradley-Terry with ties and a left
intercept, and intervals that let a person's votes hang together.

With d = strength of the left one - strength of the right one + intercept, and a threshold t >= 0:
P(left) = sigmoid(d - t), P(right) = sigmoid(-d - t), and the rest is a tie.

Letters: A annotators, N contestants, P = N + 2 parameters (strengths, intercept, threshold); the
last axis of counts is left, right, tie. Leading axes, written ..., are fitted side by side.

Sources: Bradley & Terry 1952, doi:10.2307/2334029; Rao & Kupper 1967,
doi:10.1080/01621459.1967.10482901 (ties); Davidson & Beaver 1977, doi:10.2307/2529467 (order);
Liang & Zeger 1986, doi:10.1093/biomet/73.1.13 (the sandwich over annotators).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_STEPS = 60
_SMALL = 1e-10
_LEAST_THRESHOLD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """Fitted strengths, in log-odds, and how sure they are."""

    strength: np.ndarray
    """(..., N); that of the anchor is 0."""
    strength_error: np.ndarray
    """(..., N) standard errors, over annotators, of the difference to the anchor."""
    left: np.ndarray
    """(...) log-odds that a picture gains by being on the left."""
    left_error: np.ndarray
    threshold: np.ndarray
    """(...) of ties; 0 where there is none."""
    widening: np.ndarray
    """(..., N) by what the variance over annotators exceeds that of independent votes."""
    quantile: float
    """Standard errors to each side of a 95 % interval."""

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """The (..., N) ends of 95 % intervals of the strengths."""
        half = self.quantile * self.strength_error
        return self.strength - half, self.strength + half

    def left_interval(self) -> tuple[np.ndarray, np.ndarray]:
        """The (...) ends of the 95 % interval of the left intercept."""
        half = self.quantile * self.left_error
        return self.left - half, self.left + half


def fit_strengths(counts: np.ndarray, anchor: int = 0, ridge: float = 1e-3) -> Strengths:
    """The strengths of most probable votes.

    ``counts`` is (..., A, N, N, 3): of each annotator how often the first of two contestants stood
    left and won, lost or tied. ``ridge`` is the precision of a normal prior on strengths and
    intercept, which keeps one that never lost from infinity; it is worth a few thousandths of a
    vote. With A = 1 the errors are those of independent votes.
    """
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=-4)
    parameters, ties = _maximise(total, anchor, ridge)
    information = _information(parameters, total, anchor, ridge, ties)
    model = np.linalg.inv(information)

    # each annotator's part in the slope says how far their votes hang together
    people = (counts.sum(axis=(-3, -2, -1)) > 0).sum(axis=-1)
    least = int(people.min()) if people.size else 0
    if least > 1:
        slope_AP = _slope(parameters[..., None, :], counts, ties[..., None])
        slope_AP[..., anchor] = 0.0
        spread = np.einsum("...ap,...aq->...pq", slope_AP, slope_AP)
        scale = people / np.maximum(people - 1, 1)
        covariance = scale[..., None, None] * (model @ spread @ model)
    else:
        covariance = model
    variance = np.diagonal(covariance, axis1=-2, axis2=-1)
    plain = np.diagonal(model, axis1=-2, axis2=-1)
    error = np.sqrt(np.maximum(variance, 0.0))
    error[..., anchor] = 0.0
    count = counts.shape[-2]
    return Strengths(
        strength=parameters[..., :count],
        strength_error=error[..., :count],
        left=parameters[..., count],
        left_error=error[..., count],
        threshold=parameters[..., count + 1],
        widening=np.maximum(variance, 0.0)[..., :count] / plain[..., :count],
        quantile=_quantile(least),
    )


def votes_needed(share: float, power: float = 0.8) -> float:
    """Votes that tell a win rate from one half, with 95 % and the given power; inf for one half.

    Ties count as half a win. Of the usual test of a share: two-sided, normal approximation.
    """
    if share == 0.5:
        return float("inf")
    sure = NormalDist().inv_cdf(0.975)
    found = NormalDist().inv_cdf(power)
    spread = 0.5 * sure + found * (share * (1 - share)) ** 0.5
    return float((spread / (share - 0.5)) ** 2)


def win_matrix(counts: np.ndarray) -> np.ndarray:
    """(N, N): wins of the row over the column, ties as a half for both, whatever the sides.

    ``counts`` is (A, N, N, 3) as for ``fit_strengths``.
    """
    total = np.asarray(counts, dtype=np.float64).sum(axis=0)
    half = total[..., 2] / 2
    return total[..., 0] + half + (total[..., 1] + half).T


# --- the fit -------------------------------------------------------------------------------------


def _quantile(people: int) -> float:
    """Student's with one degree of freedom fewer than there are annotators: with few of them the
    spread between them is itself uncertain."""
    if people < 2:
        return NormalDist().inv_cdf(0.975)
    from scipy.special import stdtrit

    return float(stdtrit(people - 1, 0.975))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _lean(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(d, t): the (..., N, N) leaning to the left one, and the threshold."""
    strength = parameters[..., :-2]
    d = strength[..., :, None] - strength[..., None, :] + parameters[..., -2, None, None]
    return d, parameters[..., -1, None, None]


def _log_likelihood(parameters: np.ndarray, total: np.ndarray, ridge: float) -> np.ndarray:
    d, t = _lean(parameters)
    wins, losses, ties = np.moveaxis(total, -1, 0)
    log_left = -np.logaddexp(0.0, t - d)
    log_right = -np.logaddexp(0.0, t + d)
    # log P(tie) = log P(left) + log P(right) + log(exp(2 t) - 1)
    log_gap = np.log(np.expm1(2 * np.maximum(t, _LEAST_THRESHOLD)))
    value = (wins + ties) * log_left + (losses + ties) * log_right
    value = value + np.where(ties > 0, ties * log_gap, 0.0)
    prior = 0.5 * ridge * (parameters[..., :-1] ** 2).sum(axis=-1)
    return value.sum(axis=(-2, -1)) - prior


def _slope(parameters: np.ndarray, total: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """(..., P) derivative of the log-likelihood, without the prior; ``ties`` says where there are
    any."""
    d, t = _lean(parameters)
    won, lost, tied = np.moveaxis(total, -1, 0)
    by_left = (won + tied) * (1 - _sigmoid(d - t))
    by_right = (lost + tied) * (1 - _sigmoid(-d - t))
    by_d = by_left - by_right
    by_t = -by_left - by_right
    gap = 2 / -np.expm1(-2 * np.maximum(t, _LEAST_THRESHOLD))
    by_t = (by_t + tied * gap).sum(axis=(-2, -1)) * ties
    by_strength = by_d.sum(axis=-1) - by_d.sum(axis=-2)
    return np.concatenate(
        [by_strength, by_d.sum(axis=(-2, -1))[..., None], by_t[..., None]], axis=-1
    )


def _information(
    parameters: np.ndarray, total: np.ndarray, anchor: int, ridge: float, ties: np.ndarray
) -> np.ndarray:
    """(..., P, P) minus the second derivative, with the prior; rows of what is held fixed (the
    anchor, and the threshold where there is no tie) are the identity's."""
    d, t = _lean(parameters)
    won, lost, tied = np.moveaxis(total, -1, 0)
    left = _sigmoid(d - t)
    right = _sigmoid(-d - t)
    of_left = (won + tied) * left * (1 - left)
    of_right = (lost + tied) * right * (1 - right)
    twice_d = of_left + of_right
    d_and_t = of_right - of_left

    # strengths among themselves: a graph's Laplacian
    count = parameters.shape[-1] - 2
    both = twice_d + np.swapaxes(twice_d, -1, -2)
    found = np.zeros((*parameters.shape, count + 2))
    diagonal = np.arange(count)
    found[..., :count, :count] = -both
    found[..., diagonal, diagonal] += both.sum(axis=-1)

    # with the intercept and the threshold
    by_intercept = twice_d.sum(axis=-1) - twice_d.sum(axis=-2)
    by_threshold = d_and_t.sum(axis=-1) - d_and_t.sum(axis=-2)
    found[..., :count, count] = found[..., count, :count] = by_intercept
    found[..., :count, count + 1] = found[..., count + 1, :count] = by_threshold
    found[..., count, count] = twice_d.sum(axis=(-2, -1))
    cross = d_and_t.sum(axis=(-2, -1))
    found[..., count, count + 1] = found[..., count + 1, count] = cross
    sharp = 1 / np.sinh(np.maximum(t, _LEAST_THRESHOLD)) ** 2
    found[..., count + 1, count + 1] = (twice_d + tied * sharp).sum(axis=(-2, -1))

    # the prior, and what is held fixed
    inner = np.arange(count + 1)
    found[..., inner, inner] += ridge
    _fix(found, np.broadcast_to(True, found.shape[:-2]), anchor)
    _fix(found, ~ties, count + 1)
    return found


def _fix(matrix: np.ndarray, where: np.ndarray, index: int) -> None:
    """Makes a parameter's row and column the identity's."""
    matrix[..., index, :] = np.where(where[..., None], 0.0, matrix[..., index, :])
    matrix[..., :, index] = np.where(where[..., None], 0.0, matrix[..., :, index])
    matrix[..., index, index] = np.where(where, 1.0, matrix[..., index, index])


def _maximise(total: np.ndarray, anchor: int, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """((..., P) parameters, (...) whether there are ties), by Newton's steps: the log-likelihood is
    concave, so a step that is halved until it rises leads to the top."""
    count = total.shape[-2]
    ties = total[..., 2].sum(axis=(-2, -1)) > 0
    parameters = np.zeros((*total.shape[:-3], count + 2))
    parameters[..., -1] = np.where(ties, 0.3, 0.0)
    value = _log_likelihood(parameters, total, ridge)
    for _ in range(_STEPS):
        slope = _slope(parameters, total, ties)
        slope[..., :-1] -= ridge * parameters[..., :-1]
        slope[..., anchor] = 0.0
        information = _information(parameters, total, anchor, ridge, ties)
        step = np.linalg.solve(information, slope[..., None])[..., 0]
        gain = (step * slope).sum(axis=-1)
        if np.all(gain < _SMALL):
            break

        # halve where the threshold would leave its range, or the value would fall
        for _ in range(_STEPS):
            tried = parameters + step
            better = _log_likelihood(tried, total, ridge)
            bad = (better < value - _SMALL) | ((tried[..., -1] <= 0) & ties)
            if not bad.any():
                break
            step = np.where(bad[..., None], step / 2, step)
        parameters = tried
        value = better
    return parameters, ties
