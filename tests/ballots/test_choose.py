"""Rules of choice: their numbers, their probabilities, and what they save."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rlalign.ballots.choose import Information, fisher, gap, pick, stay, uncertain
from rlalign.ballots.deal import Deal
from rlalign.ballots.records import Item


def test_without_ties_a_vote_tells_p_times_1_minus_p() -> None:
    win = np.array([0.1, 0.5, 0.9])
    margin = np.log(win / (1 - win))
    np.testing.assert_allclose(uncertain(margin), [0.09, 0.25, 0.09])
    np.testing.assert_allclose(gap(margin), abs(margin))


def test_with_ties_it_is_the_information_of_three_outcomes() -> None:
    """The sum of (dP/dm)^2 / P over left, right and tie, by finite differences."""

    def chances(margin: np.ndarray) -> np.ndarray:
        left = 1 / (1 + np.exp(0.8 - margin))
        right = 1 / (1 + np.exp(0.8 + margin))
        return np.stack([left, right, 1 - left - right])

    margin = np.linspace(-3, 3, 61)
    slope = (chances(margin + 1e-5) - chances(margin - 1e-5)) / 2e-5
    expected = (slope**2 / chances(margin)).sum(axis=0)
    found = uncertain(margin, threshold=0.8)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # with more ties, pairs that would mostly be one tell less than others
    assert abs(margin[np.argmax(uncertain(margin, threshold=2.0))]) > 1.0


def test_fishers_score_is_the_growth_of_the_determinant() -> None:
    """log det(H + w f f') - log det H = log(1 + w f' H^-1 f), and the inverse is kept exactly."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 5))
    margins = rng.normal(size=40)
    known = Information(5, prior=2.0)
    H = 2.0 * np.eye(5)
    for one, margin in zip(features, margins, strict=True):
        (score,) = fisher(np.array([margin]), one[None], known.inverse_DD, threshold=0.3)
        weight = float(uncertain(margin, threshold=0.3))
        grown = H + weight * np.outer(one, one)
        growth = np.linalg.slogdet(grown)[1] - np.linalg.slogdet(H)[1]
        assert np.log1p(score) == pytest.approx(growth)
        known.add(one, weight)
        H = grown
    np.testing.assert_allclose(known.inverse_DD, np.linalg.inv(H), rtol=1e-9)


def test_a_propensity_is_how_often_a_pair_is_picked() -> None:
    """8,000 draws, seed 0; a share's standard deviation is at most 0.0056."""
    score = np.array([0.1, 0.9, 0.9, 0.2])
    rng = np.random.default_rng(0)
    picks = [pick(score, "uncertain", rng, random_share=0.4) for _ in range(8_000)]
    often = Counter(one.index for one in picks)
    stated = {one.index: one.propensity for one in picks}
    assert sum(stated.values()) == pytest.approx(1.0)
    for index, propensity in stated.items():
        assert often[index] / 8_000 == pytest.approx(propensity, abs=0.022)
    by_rule = Counter(one.rule for one in picks)
    assert by_rule["random"] / 8_000 == pytest.approx(0.4, abs=0.022)


def test_votes_weighted_by_propensity_give_the_mean_over_all_pairs() -> None:
    """Whatever the rule prefers: 8,000 draws, seed 0, within four standard errors."""
    rng = np.random.default_rng(0)
    value = rng.normal(size=30)
    score = value + rng.normal(size=30)
    picks = [pick(score, "gap", rng, random_share=0.5) for _ in range(8_000)]
    weighed = np.array([value[one.index] / one.propensity / 30 for one in picks])
    assert abs(weighed.mean() - value.mean()) < 4 * weighed.std() / len(picks) ** 0.5
    plain = np.array([value[one.index] for one in picks])
    assert abs(plain.mean() - value.mean()) > 8 * plain.std() / len(picks) ** 0.5


def test_the_winner_stays() -> None:
    assert stay("a", ["a", "b", "c"]) == ("a", "b")
    assert stay("a", ["a"]) is None


def test_what_is_missing_leaves_its_share_to_the_others() -> None:
    deal = Deal(gold=0.1, repeat=0.1, shared=0.2)
    rng = np.random.default_rng(0)
    assert deal.kind(["live"], rng) == ("live", 1.0)
    drawn = dict(deal.kind(["live", "gold"], rng) for _ in range(99))
    assert drawn == {"live": pytest.approx(0.6 / 0.7), "gold": pytest.approx(0.1 / 0.7)}
    assert Deal(shared=0.0, gold=0.0, repeat=0.0).kind(["shared"], rng) == ("shared", 1.0)


def test_a_rule_chooses_among_live_pairs_alone() -> None:
    def last(items: object, rng: object) -> tuple[int, float, str]:
        return 1, 0.5, "last"

    deal = Deal(rule=last)
    live = [Item(id=str(n), campaign="c", caption="", uids=("a", "b")) for n in range(2)]
    gold = [Item(id="g", campaign="c", caption="", uids=("a", "b"), kind="gold")]
    rng = np.random.default_rng(0)
    assert deal.pick(live, rng) == (1, 0.5, "last")
    assert deal.pick(gold, rng) == (0, 1.0, "random")
