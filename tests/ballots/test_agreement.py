"""Agreement against the package krippendorff and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlalign.ballots.agreement import agreement, alpha, count_values, share_interval

answers = st.lists(
    st.lists(st.sampled_from([0, 1, 2, None]), min_size=4, max_size=4), min_size=2, max_size=12
)


@given(answers)
@settings(deadline=None, derandomize=True)
def test_alpha_is_that_of_the_package(said: list[list[int | None]]) -> None:
    import krippendorff

    values = {unit: [one for one in row if one is not None] for unit, row in enumerate(said)}
    counts = count_values(values)
    seen = {value for row in values.values() if len(row) > 1 for value in row}
    if len(seen) < 2:
        assert np.isnan(alpha(counts))
        assume(False)
    theirs = np.array([[np.nan if one is None else one for one in row] for row in said]).T
    expected = krippendorff.alpha(reliability_data=theirs, level_of_measurement="nominal")
    assert alpha(counts) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("right", "agree", "expected"), [(0.7, 0.58, 0.16), (0.9, 0.82, 0.64)])
def test_two_people_who_are_mostly_right(right: float, agree: float, expected: float) -> None:
    """They agree in r^2 + (1 - r)^2 of pairs; with both values as frequent alpha is 2 a - 1."""
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=20_000)
    said = np.where(rng.random((2, 20_000)) < right, truth, 1 - truth)
    counts = np.stack([(said == 0).sum(axis=0), (said == 1).sum(axis=0)], axis=1)
    share, (low, high) = agreement(counts)
    assert share == pytest.approx(agree, abs=0.01)
    assert low < agree < high
    assert alpha(counts) == pytest.approx(expected, abs=0.02)


def test_agreement_counts_pairs_of_people_in_each_unit() -> None:
    counts = np.array([[3, 0], [2, 1], [0, 1], [2, 2]])
    share, (low, high) = agreement(counts)
    assert share == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert 0 <= low < share < high <= 1
    assert np.isnan(agreement(np.array([[1, 0]]))[0])


def test_an_interval_of_a_share_is_wilsons() -> None:
    """Its ends solve (share - p)^2 = z^2 p (1 - p) / n."""
    low, high = share_interval(14, 20)
    for end in (low, high):
        assert (0.7 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 20, rel=1e-5)
    assert share_interval(0, 0) == (0.0, 1.0)
    assert share_interval(5, 5)[1] == 1.0
