"""Votes as pairs: written in Pick-a-Pic's columns, read by our own reader."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlalign.ballots.deal import Deal
from rlalign.ballots.label_studio import Judgement
from rlalign.ballots.quality import Rules
from rlalign.ballots.records import Answer, Campaign, Item, Picture, picture_uid
from rlalign.ballots.store import Store
from rlalign.core.registry import UserError
from rlalign.data.pairs.columns import OPTIONAL, REQUIRED, write_pairs
from rlalign.data.pairs.reader import PairReader, PreferenceSettings
from rlalign.data.pairs.rows import decode
from rlalign.data.pairs.votes import (
    EXTRAS,
    Filters,
    export_votes,
    rows_of_judgements,
    rows_of_votes,
    select_votes,
)


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def answer(choice: str, **other: Any) -> Answer:
    return Answer(nonce="n", choice=choice, decide_ms=500.0, **other)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """Two people: ann answers left, right, tie, both bad and skip in turn, and one gold pair; bob
    answers one pair in 50 ms."""
    opened = Store.open(tmp_path / "votes.db")
    opened.create_campaign(Campaign(id="c", mode="pairs"))
    for number in range(6):
        uids = []
        for side in range(2):
            content = png(10 * number + side)
            uids.append(picture_uid(content))
            opened.add_picture(Picture(uid=uids[-1], caption="x", policy=f"policy {side}"), content)
        opened.add_items(
            [
                Item(
                    id=str(number),
                    campaign="c",
                    caption=f"caption {number % 2}",
                    uids=tuple(uids),
                    kind="gold" if number == 5 else "live",
                    truth=uids[0] if number == 5 else "",
                    target=0,
                )
            ]
        )
    ann = opened.join("ann", "token", "1", 0.0).id
    bob = opened.join("bob", "another token", "1", 1.0).id
    deal = Deal(gold=0.0, repeat=0.0)
    for number, choice in enumerate(("left", "right", "tie", "both_bad", "skip")):
        ballot = opened.issue("c", ann, 1e9, deal)
        assert ballot is not None
        said = answer(choice, reasons=("looks", "text") if number == 0 else ())
        opened.vote(ann, ballot.id, said, 1e9 + number)
    ballot = opened.issue("c", bob, 1e9, deal)
    assert ballot is not None
    opened.vote(bob, ballot.id, Answer(nonce="n", choice="left", decide_ms=50.0), 1e9)
    yield opened
    opened.close()


def test_votes_are_pairs_that_our_reader_reads(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    assert export_votes(store, "c", path) == 5
    table = pq.read_table(path)
    assert set(table.schema.names) == {*REQUIRED, *OPTIONAL, *EXTRAS}
    assert len((*REQUIRED, *OPTIONAL)) == 18, "all of Pick-a-Pic v2's"

    rows = table.to_pylist()
    votes = list(store.votes("c"))
    kept = [vote for vote in votes if vote.answer.choice != "skip"]
    assert [row["label_0"] for row in rows] == [1.0, 0.0, 0.5, 0.5, 1.0]
    assert [row["label_0"] + row["label_1"] for row in rows] == [1.0] * 5
    for row, vote in zip(rows, kept, strict=True):
        assert (row["image_0_uid"], row["image_1_uid"]) == vote.ballot.shown
        assert row["jpg_0"] == store.content(vote.ballot.shown[0])
        assert row["best_image_uid"] == (vote.best or "none")
        assert row["ranking_id"] == vote.seq
        assert row["created_at"].replace(tzinfo=UTC).timestamp() == pytest.approx(vote.at)
    assert rows[0]["reasons"] == "looks,text"
    assert rows[0]["user_id"] != rows[4]["user_id"]
    assert {row["num_example_per_prompt"] for row in rows} <= {1, 2, 3, 4}

    reader = PairReader(PreferenceSettings(path=str(path), ties="half", pairs_per_pass=1), 0)
    pairs = list(reader.all())
    assert [pair.label_0 for pair in pairs] == [1.0, 0.0, 0.5, 0.5, 1.0]
    for pair, row in zip(pairs, rows, strict=True):
        shade = np.asarray(Image.open(io.BytesIO(row["jpg_0"])))[0, 0, 0]
        assert pair.media_0[0, 0, 0, 0] == shade
        assert pair.source == row["model_0"]
    drops = PairReader(PreferenceSettings(path=str(path), pairs_per_pass=1), 0)
    assert len(drops) == 3, "ties are dropped where the run says so"


def test_the_card_states_filters_and_counts(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    filters = Filters(people=Rules(min_ms=100.0, least=1), ties=False)
    assert export_votes(store, "c", path, filters) == 2
    card = (tmp_path / "pairs.card.md").read_text()
    assert "2 pairs of 2 votes by 1 people on" in card
    assert "| skips | 1 |" in card
    assert "| ties | 2 |" in card
    assert "| of people who are left out | 1 |" in card
    assert "people.min_ms 100.0" in card
    assert "ties left out" in card
    assert "People left out: 1.\n- median of 50 ms, 100 asked\n" in card
    assert max(map(len, card.splitlines())) < 200


def test_votes_on_clips_are_written_and_read_with_all_frames(tmp_path: Path) -> None:
    """One vote on two clips: the file has their bytes, the reader their frames."""
    store = Store.open(tmp_path / "clips.db")
    store.create_campaign(Campaign(id="c", mode="pairs"))
    contents = []
    for shade in (10, 20):
        file = io.BytesIO()
        frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (shade, 200)]
        frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
        contents.append(file.getvalue())
        picture = Picture(uid=picture_uid(contents[-1]), caption="x", frames=2, rate=12.0)
        store.add_picture(picture, contents[-1])
    uids = tuple(picture_uid(content) for content in contents)
    store.add_items([Item(id="i", campaign="c", caption="x", uids=uids)])
    ann = store.join("ann", "token", "", 0.0).id
    ballot = store.issue("c", ann, 0.0, Deal())
    assert ballot is not None
    store.vote(ann, ballot.id, answer("left"), 1.0)
    export_votes(store, "c", tmp_path / "pairs.parquet")
    card = (tmp_path / "pairs.card.md").read_text()
    assert "1 votes are on clips, whose files the columns hold whole (`frames` of each).\n" in card
    (row,) = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert {row["jpg_0"], row["jpg_1"]} == set(contents)
    assert (row["frames"], row["rate"]) == (2, 12.0)
    reds = {tuple(decode(row[f"jpg_{side}"])[:, 0, 0, 0].tolist()) for side in (0, 1)}
    assert reds == {(10, 200), (20, 200)}


def test_a_cursor_gives_the_same_file_whatever_is_voted_later(store: Store, tmp_path: Path) -> None:
    cursor = store.cursor()
    before = select_votes(store, "c")
    person = store.annotators()[1].id
    store.undo("c", person, "u", 2e9)
    store.set_status(store.annotators()[0].id, "left_out", "a test", 2e9)
    assert select_votes(store, "c", upto=cursor) == before
    now = select_votes(store, "c")
    assert now.votes == []
    assert now.people == {store.annotators()[0].id: "left out by hand"}
    with pytest.raises(UserError, match="no vote to write .5 of people who are left out"):
        export_votes(store, "c", tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()


def test_fast_votes_and_gold_are_left_out(store: Store) -> None:
    selection = select_votes(store, "c", Filters(min_ms=100.0))
    assert selection.counts == {"skips": 1, "decided in under 100 ms": 1}
    person = store.annotators()[1].id
    while ballot := store.issue("c", person, 0.0, Deal(gold=0.9, repeat=0.0, shared=0.0)):
        store.vote(person, ballot.id, answer("left"), 0.0)
    assert select_votes(store, "c").counts["on gold pairs"] == 1


def test_a_ranking_is_written_as_its_pairs(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "votes.db")
    store.create_campaign(Campaign(id="c", mode="rank"))
    uids = []
    for shade in range(3):
        uids.append(picture_uid(png(shade)))
        store.add_picture(Picture(uid=uids[-1], caption="x"), png(shade))
    store.add_items([Item(id="0", campaign="c", caption="x", uids=tuple(uids))])
    person = store.join("ann", "token", "1", 0.0).id
    ballot = store.issue("c", person, 0.0, Deal())
    assert ballot is not None
    store.vote(person, ballot.id, answer("rank", ranking=((1,), (0, 2))), 0.0)
    rows = list(rows_of_votes(store, list(store.votes("c"))))
    assert [row["label_0"] for row in rows] == [0.0, 0.5, 1.0]
    assert {row["ranking_id"] for row in rows} == {1}
    assert {row["num_example_per_prompt"] for row in rows} == {3}
    store.close()


def test_further_columns_must_be_named(tmp_path: Path) -> None:
    row = {"caption": "x", "jpg_0": b"a", "jpg_1": b"b", "label_0": 1.0, "label_1": 0.0}
    path = tmp_path / "pairs.parquet"
    with pytest.raises(UserError, match="has 'rule'"):
        write_pairs(path, [{**row, "rule": "random"}])
    with pytest.raises(UserError, match="lacks 'rule'"):
        write_pairs(path, [row], extras={"rule": "string"})
    further = {**row, "rule": "random", "share": 0.5}
    write_pairs(path, [further], extras={"rule": "string", "share": "double"})
    schema = pq.read_schema(path)
    assert schema.field("rule").type == pa.string()
    assert schema.field("share").type == pa.float64()


def judgement(outcome: str, left: str = "l.png", right: str = "r.png") -> Judgement:
    return Judgement(
        task="7",
        annotator="10",
        caption="x",
        left=left,
        right=right,
        outcome=outcome,  # type: ignore[arg-type]
        at=1e9,
        decide_ms=1.0,
    )


def test_label_studios_judgements_are_pairs(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "l.png").write_bytes(png(1))
    (tmp_path / "r.png").write_bytes(png(2))
    names: Callable[[str], Judgement] = lambda outcome: judgement(  # noqa: E731
        outcome, "/data/upload/1/l.png", "/data/local-files/?d=r.png"
    )
    rows = list(rows_of_judgements(map(names, ("left", "right", "tie")), tmp_path))
    assert [row["label_0"] for row in rows] == [1.0, 0.0, 0.5]
    assert rows[1]["best_image_uid"] == picture_uid(png(2))
    path = tmp_path / "pairs.parquet"
    write_pairs(path, rows)
    pairs = PairReader(PreferenceSettings(path=str(path), ties="half", pairs_per_pass=1), 0).all()
    assert [pair.label_0 for pair in pairs] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://host/l.png", "is an address"),
        ("s3://bucket/l.png", "is an address"),
        ("gone.png", "must be a file below"),
        ("../secret.png", "must be a file below"),
        ("/data/local-files/?d=../secret.png", "must be a file below"),
    ],
)
def test_a_picture_that_is_not_below_the_folder_is_refused(
    tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(UserError, match=said):
        list(rows_of_judgements([judgement("left", name)], folder))
