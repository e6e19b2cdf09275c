"""How far people agree: Krippendorff's alpha for nominal values, and plain agreement.

Preferences are not labels. Two people who are right 80 % of the time agree in 67 % of pairs and
have an alpha of 0.35: sets of preferences live between 0.2 and 0.5, and the 0.67 that is asked of
labels says nothing about them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from statistics import NormalDist

import numpy as np

USUAL_ALPHA = (0.2, 0.5)
"""Where the alpha of sets of preferences usually is."""


def count_values(values: Mapping[Hashable, Iterable[Hashable]]) -> np.ndarray:
    """(U, V) int64: how many people gave each of V values to each of U units."""
    known: dict[Hashable, int] = {}
    rows = [[known.setdefault(value, len(known)) for value in said] for said in values.values()]
    counts_UV = np.zeros((len(rows), len(known)), dtype=np.int64)
    for unit, row in enumerate(rows):
        np.add.at(counts_UV[unit], row, 1)
    return counts_UV


def alpha(counts_UV: np.ndarray) -> float:
    """Krippendorff's alpha for nominal values: 1 is full agreement, 0 what chance gives.

    ``counts_UV`` holds how many people gave each value to each unit; units that one person alone
    has seen say nothing and are left out. nan where nothing can disagree: no unit with two values,
    or one value throughout.

    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C.
    """
    counts_UV = np.asarray(counts_UV, dtype=np.float64)
    people_U = counts_UV.sum(axis=1)
    counts_UV = counts_UV[people_U >= 2]
    people_U = people_U[people_U >= 2]
    total = people_U.sum()

    # pairs of people within a unit that disagree, each unit's weighted by its number of people
    differ_U = people_U**2 - (counts_UV**2).sum(axis=1)
    observed = (differ_U / (people_U - 1)).sum()

    # pairs that would disagree, were the values dealt out at random
    counts_V = counts_UV.sum(axis=0)
    expected = (total**2 - (counts_V**2).sum()) / max(total - 1, 1)
    return float(1 - observed / expected) if expected > 0 else float("nan")


def agreement(counts_UV: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The share of pairs of people that gave the same value to a unit, each unit counting the same,
    and its 95 % interval over units; nan where no unit was seen by two."""
    counts_UV = np.asarray(counts_UV, dtype=np.float64)
    people_U = counts_UV.sum(axis=1)
    counts_UV = counts_UV[people_U >= 2]
    people_U = people_U[people_U >= 2]
    if not len(people_U):
        return float("nan"), (float("nan"), float("nan"))
    same_U = (counts_UV * (counts_UV - 1)).sum(axis=1) / (people_U * (people_U - 1))
    mean = float(same_U.mean())
    if people_U.max() == 2:  # each unit agrees or does not
        return mean, share_interval(round(float(same_U.sum())), len(same_U))
    half = NormalDist().inv_cdf(0.975) * same_U.std(ddof=1 if len(same_U) > 1 else 0)
    half /= np.sqrt(len(same_U))
    return mean, (max(mean - half, 0.0), min(mean + half, 1.0))


def share_interval(count: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share ``count / of``; (0, 1) of nothing.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if not of:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = count / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * ((share * (1 - share) + z * z / (4 * of)) / of) ** 0.5 / (1 + z * z / of)
    return max(middle - half, 0.0), min(middle + half, 1.0)
