"""Simulated people choose as often as their formula says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.ballots.deal import Deal
from rlalign.ballots.records import Campaign, Item, Picture, picture_uid
from rlalign.ballots.store import Store
from rlalign.core.prompts import record_of
from rlalign.data.pairs.growing import GrowingPairs
from rlalign.data.pairs.reader import PairReader
from rlalign.data.pairs.settings import BallotSettings, PreferenceSettings
from rlalign.data.pairs.votes import export_votes
from rlalign.voting.judges import Judge, People, agreement
from rlalign.voting.settings import Simulate
from tests.votes import png


def judge(**changes: Any) -> Judge:
    settings = {
        "votes": 1,
        "utility": [{"name": "function", "call": "tests.voting.test_queue:brightness"}],
        "temperature": 0.1,
        "lapse": 0.0,
        "left": 0.0,
        **changes,
    }
    return Judge(Simulate.model_validate(settings), 0)


def test_a_left_picture_is_chosen_as_often_as_the_formula_says() -> None:
    """2,000 draws: the standard error is at most 0.0112; the margin is four of them."""
    one = judge(lapse=0.1, left=0.3)
    pictures = [png(100), png(80)]
    difference = 20 / 255
    wins = 1 / (1 + math.exp(-(difference / 0.1 + 0.3)))
    expected = 0.05 + 0.9 * wins
    assert one.chance_of_left(difference) == pytest.approx(expected)
    left = [one.answer("c", pictures, "somebody", k).choice == "left" for k in range(2000)]
    assert np.mean(left) == pytest.approx(expected, abs=0.045)


def test_a_choice_depends_on_its_key_alone() -> None:
    pictures = [png(100), png(99)]
    said = [judge().answer("c", pictures, "p", k).choice for k in range(40)]
    assert said == [judge().answer("c", pictures, "p", k).choice for k in range(40)]
    assert said != [judge().answer("c", pictures, "q", k).choice for k in range(40)]


def test_agreement_of_two_people() -> None:
    assert agreement(judge(), [0.0]) == pytest.approx(0.5)
    assert agreement(judge(), [100.0]) == pytest.approx(1.0)
    # right 8 times of 10: 0.64 + 0.04
    difference = 0.1 * math.log(4.0)
    assert agreement(judge(), [difference]) == pytest.approx(0.68)
    # a coin for both sides' bias: the two sides of a pair differ
    biased = judge(left=math.log(4.0))
    assert agreement(biased, [0.0]) == pytest.approx(0.68)


def test_a_ranking_puts_the_best_first_as_often_as_luce_says() -> None:
    one = judge()
    pictures = [png(100), png(120), png(110)]
    weight = np.exp(np.array([100, 120, 110]) / 255 / 0.1)
    first = [one.answer("c", pictures, "p", k).ranking[0][0] for k in range(2000)]
    share = np.bincount(first, minlength=3) / 2000
    assert share == pytest.approx(weight / weight.sum(), abs=0.045)


def wanted_shade(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """How near each picture comes to its record's shade; without a record it fails."""
    shade_B = torch.tensor([record_of(prompt)["shade"] for prompt in prompts])
    return -(media_BFCHW.mean((1, 2, 3, 4)) * 255.0 - shade_B).abs()


def test_a_prompts_record_reaches_who_judges_and_the_pairs(tmp_path: Path) -> None:
    """As it was drawn by, through the store: the darker one is wanted, of one text of two."""
    store = Store.open(tmp_path / "votes.db")
    store.create_campaign(Campaign(id="c", mode="pairs"))
    for shade in (10, 70):
        contents = [png(shade), png(shade + 50)]
        uids = tuple(picture_uid(content) for content in contents)
        for uid, content in zip(uids, contents, strict=True):
            plan = {"record": {"shade": shade}}
            store.add_picture(Picture(uid=uid, caption="a shade", plan=plan), content)
        store.add_items([Item(id=f"{shade}", campaign="c", caption="a shade", uids=uids)])
    one = judge(
        votes=2,
        people=1,
        temperature=1e-3,
        utility=[{"name": "function", "call": "tests.voting.test_judges:wanted_shade"}],
    )
    people = People(store=store, campaign="c", dealer=Deal(gold=0, repeat=0, shared=0), judge=one)
    assert people.run(over=lambda: True) == 2
    votes = list(store.votes("c"))
    assert {vote.pairs[0][2] for vote in votes} <= {"left", "right"}

    # written and read back, and straight from the store
    path = tmp_path / "pairs.parquet"
    assert export_votes(store, "c", path) == 2
    store.close()
    more: dict[str, Any] = {"pairs_per_round": 2, "pairs_per_pass": 2, "size": 4}
    written = PairReader(PreferenceSettings(path=str(path), **more), 0).all()
    ballots = BallotSettings(store=str(tmp_path / "votes.db"))
    growing = GrowingPairs(PreferenceSettings(ballots=ballots, **more), 0)
    assert growing.wait(0, print)
    for pairs in (list(written), list(growing.round(0))):
        assert sorted(record_of(pair.caption)["shade"] for pair in pairs) == [10, 70]
        for pair in pairs:
            better = pair.media_0 if pair.label_0 == 1.0 else pair.media_1
            assert int(better[0, 0, 0, 0]) == record_of(pair.caption)["shade"]
