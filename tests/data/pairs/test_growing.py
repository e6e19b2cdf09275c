"""Votes as preference pairs: which count, which a round sees, and what it waits for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlalign.ballots.deal import Deal
from rlalign.ballots.records import Answer
from rlalign.core.registry import UserError
from rlalign.data.pairs import growing
from rlalign.data.pairs.buckets import choose_bucket
from rlalign.data.pairs.campaign import one_campaign, read_vote_pairs, write_vote_pairs
from rlalign.data.pairs.growing import GrowingPairs
from rlalign.data.pairs.reader import PairReader, first_pair, open_pairs_of
from rlalign.data.pairs.rows import Pair
from rlalign.data.pairs.settings import PreferenceSettings
from tests.votes import Voted


@pytest.fixture
def voted(tmp_path: Path) -> Voted:
    return Voted(tmp_path / "votes.db")


def settings(place: Path, **changes: object) -> PreferenceSettings:
    """Preferences of a store; what is no setting of preferences is one of ballots."""
    own = {k: v for k, v in changes.items() if k in PreferenceSettings.model_fields}
    ballots = {k: v for k, v in changes.items() if k not in own}
    values = {"pairs_per_round": 4, "pairs_per_pass": 2, **own}
    return PreferenceSettings.model_validate(
        {**values, "ballots": {"store": str(place / "votes.db"), **ballots}}
    )


def said(pair: Pair) -> tuple[str, int, int, float]:
    """(caption, number of the preferred picture, of the other, label of picture 0)."""
    values = [int(pair.media_0[0, 0, 0, 0]), int(pair.media_1[0, 0, 0, 0])]
    order = values if pair.label_0 >= 0.5 else values[::-1]
    return (pair.caption, *order, pair.label_0)  # type: ignore[return-value]


def test_a_preferred_picture_wins_whatever_its_side_and_its_place(
    voted: Voted, tmp_path: Path
) -> None:
    anna = voted.person()
    sides = set()
    for number in range(12):
        voted.add("c", [number, 100 + number], annotator=anna)
        ballot = voted.ask(anna)
        sides.add(ballot.order)
        voted.answer(anna, ballot, number if number % 2 else 100 + number)
    assert sides == {(0, 1), (1, 0)}
    pairs = GrowingPairs(settings(tmp_path, pairs_per_round=12), 0)
    assert pairs.wait(0, print)
    found = sorted(said(pair)[1] for pair in pairs.round(0))
    assert found == sorted(n if n % 2 else 100 + n for n in range(12))


def test_ties_and_two_bad_ones_are_half_wins_and_skips_are_nothing(
    voted: Voted, tmp_path: Path
) -> None:
    anna = voted.person()
    for choice in ("tie", "both_bad", "skip"):
        voted.vote(anna, choice, [1, 2], choice=choice)
    with pytest.raises(UserError, match=r"votes in .*votes\.db: 0 of 1 are there"):
        GrowingPairs(settings(tmp_path, patience_seconds=1e-9), 0).wait(0, print)
    pairs = GrowingPairs(settings(tmp_path, ties="half", pairs_per_round=2), 0)
    assert pairs.wait(0, print)
    found = pairs.round(0)
    assert sorted(pair.caption for pair in found) == ["both_bad", "tie"]
    assert [pair.label_0 for pair in found] == [0.5, 0.5]


def test_a_ranking_is_every_pair_of_its_pictures(tmp_path: Path) -> None:
    from rlalign.ballots.records import Campaign

    voted = Voted(tmp_path / "votes.db", campaign="ranks")
    voted.store.create_campaign(Campaign(id="order", mode="rank"))
    voted.campaign = "order"
    anna = voted.person()
    item = voted.add("c", [10, 20, 30], annotator=anna)
    ballot = voted.ask(anna)
    place = {uid: ballot.shown.index(uid) for uid in item.uids}
    best, second, third = (place[uid] for uid in item.uids)
    answer = Answer(nonce="n", choice="rank", ranking=((third,), (best, second)))
    voted.store.vote(anna, ballot.id, answer, voted.now)
    found = read_vote_pairs(
        voted.store,
        "order",
        settings(tmp_path).ballots,  # type: ignore[arg-type]
        voted.store.cursor(),
    )
    labels = {(item.uids.index(p.uid_0), item.uids.index(p.uid_1)): p.label_0 for p in found}
    assert labels == {(0, 1): 0.5, (0, 2): 0.0, (1, 2): 0.0}


def test_what_measures_people_is_not_learned_from(voted: Voted, tmp_path: Path) -> None:
    anna = voted.person()
    voted.add("gold", [1, 2], annotator=anna, kind="gold")
    voted.add("live", [3, 4], annotator=anna)
    mostly_gold = Deal(gold=0.999, repeat=0.0, shared=0.0)
    ballot = voted.store.issue("shapes", anna, voted.now, mostly_gold)
    assert ballot is not None and ballot.item.kind == "gold"
    voted.answer(anna, ballot, 1)
    pairs = GrowingPairs(settings(tmp_path, patience_seconds=1e-9), 0)
    with pytest.raises(UserError, match="0 of 1 are there"):
        pairs.wait(0, print)
    voted.answer(anna, voted.ask(anna), 3)
    assert pairs.wait(0, print)
    assert {pair.caption for pair in pairs.round(0)} == {"live"}


def test_people_are_left_out_as_of_the_cursor(voted: Voted, tmp_path: Path) -> None:
    anna, bert = voted.person("anna"), voted.person("bert")
    voted.vote(anna, "of anna", [1, 2])
    voted.vote(bert, "of bert", [3, 4], decide_ms=100.0)
    before = voted.store.cursor()
    ballots = settings(tmp_path).ballots
    assert ballots is not None
    voted.store.set_status(bert, "left_out", "fast", voted.now)
    after = voted.store.cursor()

    def captions(cursor: int, **changes: object) -> list[str]:
        chosen = ballots.model_copy(update=changes)
        return [pair.caption for pair in read_vote_pairs(voted.store, "shapes", chosen, cursor)]

    assert captions(before) == ["of anna", "of bert"]
    assert captions(after) == ["of anna"]
    assert captions(before, min_ms=500) == ["of anna"]
    voted.store.set_status(bert, "active", "", voted.now)
    assert captions(voted.store.cursor()) == ["of anna", "of bert"]


def test_a_vote_that_was_taken_back_stands_in_rounds_before(voted: Voted, tmp_path: Path) -> None:
    anna = voted.person()
    voted.vote(anna, "stays", [1, 2])
    voted.vote(anna, "goes", [3, 4])
    pairs = GrowingPairs(settings(tmp_path, pairs_per_round=2), 0)
    assert pairs.wait(0, print)
    voted.store.undo("shapes", anna, "nonce", voted.now)
    assert pairs.wait(1, print)
    assert {pair.caption for pair in pairs.round(0)} == {"stays", "goes"}
    assert {pair.caption for pair in pairs.round(1)} == {"stays"}


def test_a_round_takes_new_votes_first_and_fills_itself_with_earlier_ones(
    voted: Voted, tmp_path: Path
) -> None:
    anna = voted.person()
    for number in range(5):
        voted.vote(anna, "old", [number, 100])
    pairs = GrowingPairs(settings(tmp_path, pairs_per_round=6), 0)
    assert pairs.wait(0, print)
    for number in range(3):
        voted.vote(anna, "new", [50 + number, 100])
    assert pairs.wait(1, print)

    # five votes for six places: one comes twice
    first = [said(pair)[1] for pair in pairs.round(0)]
    assert sorted(set(first)) == [0, 1, 2, 3, 4] and len(first) == 6
    second = [said(pair) for pair in pairs.round(1)]
    assert sorted(value for caption, value, *_ in second if caption == "new") == [50, 51, 52]
    assert len({value for caption, value, *_ in second if caption == "old"}) == 3
    assert pairs.measures(1) == {"votes/cursor": 8, "votes/all": 8, "votes/fresh": 3}


def test_the_same_cursors_give_the_same_rounds(voted: Voted, tmp_path: Path) -> None:
    anna = voted.person()
    for number in range(9):
        voted.vote(anna, f"c{number % 3}", [number, 100])
    pairs = GrowingPairs(settings(tmp_path), 3)
    assert pairs.wait(0, print)
    voted.vote(anna, "later", [60, 61])
    assert pairs.wait(1, print)
    voted.vote(anna, "much later", [70, 71])
    other = GrowingPairs(settings(tmp_path), 3)
    other.load(pairs.facts())
    for number in (0, 1):
        mine, its = pairs.round(number), other.round(number)
        assert [said(pair) for pair in mine] == [said(pair) for pair in its]
        assert all(np.array_equal(a.media_1, b.media_1) for a, b in zip(mine, its, strict=True))
    assert [said(p) for p in pairs.round(0)] != [
        said(p) for p in _with_cursors(GrowingPairs(settings(tmp_path), 4), pairs).round(0)
    ]


def _with_cursors(pairs: GrowingPairs, its: GrowingPairs) -> GrowingPairs:
    pairs.load(its.facts())
    return pairs


def test_a_round_waits_and_says_what_for(
    voted: Voted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anna = voted.person()
    monkeypatch.setattr(growing, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(growing, "SAY_SECONDS", 0.0)
    heard: list[str] = []

    def vote_once(words: str) -> None:
        # somebody votes whenever the round says that it waits
        heard.append(words)
        voted.vote(anna, "c", [len(heard), 100])

    pairs = GrowingPairs(settings(tmp_path, fresh=2, least=3), 0)
    assert pairs.wait(0, vote_once)
    assert pairs.wait(1, vote_once)
    assert [line.partition(": ")[2] for line in heard] == [
        "0 of 3 are there",
        "1 of 3 are there",
        "2 of 3 are there",
        "0 of 2 are there since round 1",
        "1 of 2 are there since round 1",
    ]
    assert pairs.cursors == [3, 5]
    assert not pairs.wait(2, lambda words: None, stopped=lambda: True)
    assert pairs.cursors == [3, 5]


def test_patience_ends_a_run_with_a_way_out(tmp_path: Path) -> None:
    pairs = GrowingPairs(settings(tmp_path, patience_seconds=1e-9, campaign="shapes"), 0)
    with pytest.raises(
        UserError, match=r"waits for campaign 'shapes' in .*, which has none yet, and"
    ):
        pairs.wait(0, print)


def test_a_store_of_several_campaigns_wants_a_name(voted: Voted, tmp_path: Path) -> None:
    from rlalign.ballots.records import Campaign

    voted.store.create_campaign(Campaign(id="other", mode="pairs"))
    assert one_campaign(voted.store, "other") == "other"
    with pytest.raises(UserError, match="must name one of other, shapes"):
        one_campaign(voted.store, "")
    with pytest.raises(UserError, match="must be one of other, shapes, .* got 'mine'"):
        one_campaign(voted.store, "mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "x.parquet"}, "path and ballots exclude each other"),
        ({"reader": "ray"}, "reader must be arrow with ballots"),
        ({"min_gold": 1.5}, "min_gold"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_the_short_form_names_the_store_alone(tmp_path: Path) -> None:
    short = PreferenceSettings.model_validate({"ballots": "votes.db"})
    assert short.ballots is not None and short.ballots.store == "votes.db"
    with pytest.raises(ValueError, match="path is required, or ballots"):
        PreferenceSettings.model_validate({})
    assert first_pair(settings(tmp_path)) is None
    assert isinstance(open_pairs_of(settings(tmp_path), 0), GrowingPairs)


def test_votes_on_pictures_of_any_shape_go_into_buckets(voted: Voted, tmp_path: Path) -> None:
    """The pictures, crops and passes are those of the same votes in a file."""
    anna = voted.person()
    sides = ((32, 64), (48, 32), (32, 64), (24, 24))
    for number, side in enumerate(sides):
        voted.side = side
        voted.vote(anna, f"caption {number}", [number, 100])
    grown = GrowingPairs(settings(tmp_path, size=16, resize="buckets"), 0)
    assert grown.wait(0, print)
    pairs = {pair.caption: pair for pair in grown.round(0)}
    for number, side in enumerate(sides):
        found = pairs[f"caption {number}"]
        bucket = choose_bucket([side, side], 16)
        assert found.media_0.shape == found.media_1.shape == (1, 3, *bucket)
    passes = list(grown.passes(0))
    assert [len({pair.media_0.shape for pair in one}) for one in passes] == [1] * 3
    assert sorted(len(one) for one in passes) == [1, 1, 2]

    ballots = grown.settings.ballots
    assert ballots is not None
    write_vote_pairs(ballots, tmp_path / "pairs.parquet")
    files = grown.settings.model_copy(
        update={"path": str(tmp_path / "pairs.parquet"), "ballots": None}
    )
    written = list(PairReader(files, 0).all())
    assert len(written) == len(sides)
    for one in written:
        # an export may have the sides the other way round
        mine = pairs[one.caption]
        both = [(mine.crop_0, mine.media_0), (mine.crop_1, mine.media_1)]
        if one.label_0 != mine.label_0:
            both.reverse()
        its = [(one.crop_0, one.media_0), (one.crop_1, one.media_1)]
        for (crop, picture), (its_crop, its_picture) in zip(both, its, strict=True):
            assert crop is not None and crop == its_crop
            np.testing.assert_array_equal(picture, its_picture)


def test_its_captions_are_those_of_the_votes_of_now(voted: Voted, tmp_path: Path) -> None:
    pairs = open_pairs_of(settings(tmp_path), 0)
    assert pairs.captions == []
    anna = voted.person()
    for caption in ("b", "a", "b"):
        voted.vote(anna, caption, [1, 2])
    assert pairs.captions == ["b", "a"]


def test_an_export_has_the_pairs_that_a_run_sees(voted: Voted, tmp_path: Path) -> None:
    anna = voted.person()
    for number in range(4):
        voted.vote(anna, f"caption {number}", [number, 100])
    voted.vote(anna, "fast", [5, 100], decide_ms=10.0)
    grown = GrowingPairs(settings(tmp_path, min_ms=500), 0)
    assert grown.wait(0, print)
    ballots = grown.settings.ballots
    assert ballots is not None
    assert write_vote_pairs(ballots, tmp_path / "pairs.parquet") == 5
    files = PreferenceSettings(path=str(tmp_path / "pairs.parquet"), pairs_per_pass=4)
    written = sorted(said(pair) for pair in PairReader(files, 0).all())
    assert written == sorted(said(pair) for pair in grown.round(0))
    assert [value for _, value, *_ in written] == [0, 1, 2, 3]
