"""Weighted particles: effective sample size, resampling schemes, lineage. NumPy and float64 alone.

Letters: P groups (one picture each), N particles in a group.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Scheme = Literal["systematic", "stratified", "multinomial", "residual", "ssp"]


def log_mean_exp(log_w_PN: np.ndarray) -> np.ndarray:
    """(P,) log of the mean of exp over the last axis, without overflow; -inf where all are."""
    top = log_w_PN.max(axis=-1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(log_w_PN - safe).mean(axis=-1)) + safe[..., 0]


def normalise(log_w_PN: np.ndarray) -> np.ndarray:
    """(P, N) weights that sum to 1 in each group; equal ones where every log weight is -inf. NaN
    counts as -inf."""
    log_w_PN = np.where(np.isnan(log_w_PN), -np.inf, log_w_PN.astype(np.float64))
    top = log_w_PN.max(axis=-1, keepdims=True)
    w_PN = np.where(np.isfinite(top), np.exp(log_w_PN - np.where(np.isfinite(top), top, 0.0)), 1.0)
    return w_PN / w_PN.sum(axis=-1, keepdims=True)


def effective_size(w_PN: np.ndarray) -> np.ndarray:
    """(P,) effective sample size of normalised weights, in [1, N] (Kong 1994): 1 / sum of
    squares."""
    return 1.0 / np.square(w_PN).sum(axis=-1)


def resample(
    w_N: np.ndarray, rng: np.random.Generator, scheme: Scheme = "systematic"
) -> np.ndarray:
    """(N,) indices of parents, sorted, for one group of normalised weights; particle j has N w_j
    children in expectation.

    systematic and ssp give every particle floor or ceil of N w_j (up to one for systematic).
    Sources: Douc & Cappe 2005, arXiv:cs/0507025; Gerber, Chopin & Whiteley 2019, arXiv:1708.04139
    (Srinivasan sampling process).
    """
    count = len(w_N)
    if scheme == "multinomial":
        children_N = rng.multinomial(count, w_N / w_N.sum())
    elif scheme == "residual":
        whole_N = np.floor(count * w_N + 1e-12).astype(int)
        rest_N = np.maximum(count * w_N - whole_N, 0.0)
        left = count - whole_N.sum()
        children_N = whole_N + (rng.multinomial(left, rest_N / rest_N.sum()) if left else 0)
    elif scheme == "ssp":
        children_N = _ssp(count * w_N, rng)
    else:
        shift = rng.random() if scheme == "systematic" else rng.random(count)
        points = (np.arange(count) + shift) / count
        cumulative = np.cumsum(w_N)
        # the last sum may fall short of 1 by rounding, and the last point may lie beyond it
        parents = np.searchsorted(cumulative / cumulative[-1], points, side="right")
        return np.minimum(parents, count - 1)
    return np.repeat(np.arange(count), children_N)


def _ssp(expected_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rounds each expected number up or down so that the sum is kept and each expectation too."""
    whole_N = np.floor(expected_N + 1e-12).astype(int)
    part_N = np.clip(expected_N - whole_N, 0.0, 1.0)
    open_one: int | None = None
    for j in range(len(part_N)):
        if open_one is None:
            open_one = j
            continue
        p = part_N[open_one]
        q = part_N[j]
        # move `up` from j to the open one, or `down` the other way
        up = min(1.0 - p, q)
        down = min(p, 1.0 - q)
        if up + down <= 0.0:
            continue
        if rng.random() * (up + down) < down:
            p = p + up
            q = q - up
        else:
            p = p - down
            q = q + down
        part_N[open_one], part_N[j] = p, q
        if _settled(p):
            open_one = j if not _settled(q) else None
    children_N = whole_N + (part_N > 0.5)
    short = len(expected_N) - int(children_N.sum())
    # rounding left one part between 0 and 1: it takes what is missing
    if short:
        children_N[open_one if open_one is not None else int(np.argmax(part_N))] += short
    return children_N


def _settled(part: float) -> bool:
    return part < 1e-9 or part > 1.0 - 1e-9


def roots(parents: list[np.ndarray], count: int) -> np.ndarray:
    """(P, N) which of the first particles each of the last ones descends from; ``parents`` are the
    (P, N) indices in order."""
    if not parents:
        return np.arange(count)[None]
    now = np.broadcast_to(np.arange(parents[0].shape[1]), parents[0].shape)
    for step in parents:
        now = np.take_along_axis(now, step, axis=1)
    return now
