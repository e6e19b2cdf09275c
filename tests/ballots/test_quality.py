"""Each person's line, and whom rules leave out."""

from __future__ import annotations

import pytest

from rlalign.ballots.agreement import share_interval
from rlalign.ballots.quality import Rules, fault, left_out, measure
from tests.ballots.made_votes import made_vote


def test_a_persons_line() -> None:
    votes = [
        made_vote(1, "ann", "left"),
        made_vote(2, "ann", "right"),
        made_vote(3, "ann", "left", ms=900.0),
        made_vote(4, "ann", "tie"),
        made_vote(5, "ann", "skip", ms=1.0),
        made_vote(6, "ann", "left", kind="gold", truth="a"),
        made_vote(7, "ann", "left", kind="gold", truth="a", order=(1, 0)),
        made_vote(8, "ann", "tie", kind="gold", truth="a"),
        # repeats, sides swapped: the same picture, the same side, the same tie
        made_vote(9, "ann", "right", kind="repeat", of="b1", order=(1, 0)),
        made_vote(10, "ann", "right", kind="repeat", of="b2", order=(1, 0)),
        made_vote(11, "ann", "tie", kind="repeat", of="b4", order=(1, 0)),
        made_vote(12, "ann", "tie", kind="repeat", of="b5", order=(1, 0)),
        made_vote(13, "bob", "left"),
    ]
    ann, bob = measure(votes)
    assert (ann.annotator, ann.votes, ann.skips, ann.median_ms) == ("ann", 11, 1, 500.0)
    assert (ann.gold.count, ann.gold.of) == (1, 3)
    assert (ann.repeats.count, ann.repeats.of) == (2, 3), "a first answer was a skip"
    assert (ann.left.count, ann.left.of) == (2, 5)
    assert (ann.ties.count, ann.ties.of) == (4, 11)
    assert ann.left.value == pytest.approx(0.4)
    assert ann.left.interval == share_interval(2, 5)
    assert bob.gold.value is None


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (Rules(min_gold=0.8, least=3), "1 of 3 gold pairs, 80% asked"),
        (Rules(min_gold=0.8, least=4), ""),
        (Rules(min_repeats=0.9, least=2), "1 of 2 repeats alike, 90% asked"),
        (Rules(min_ms=600.0), "median of 500 ms, 600 asked"),
        (Rules(max_side=0.7), "100% on one side, 70% allowed"),
        (Rules(), ""),
    ],
)
def test_rules_leave_people_out(rules: Rules, said: str) -> None:
    votes = [made_vote(number, "ann", "right") for number in range(6)]
    votes += [made_vote(10 + n, "ann", "left", kind="gold", truth="ab"[n > 0]) for n in range(3)]
    votes += [made_vote(20, "ann", "left", kind="repeat", of="b0", order=(1, 0))]
    votes += [made_vote(21, "ann", "right", kind="repeat", of="b1", order=(1, 0))]
    votes = [vote for vote in votes if vote.seq != 20 or rules.max_side == 1.0]
    (ann,) = measure(votes)
    assert fault(ann, rules) == said
    assert left_out(votes, rules) == ({"ann": said} if said else {})
