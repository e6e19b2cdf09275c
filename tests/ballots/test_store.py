"""The store's verbs on both databases, and what the two promise: nothing lost, nothing twice."""

from __future__ import annotations

import multiprocessing
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from rlalign.ballots import connect, schema
from rlalign.ballots.audit import audit
from rlalign.ballots.deal import Deal
from rlalign.ballots.records import (
    Answer,
    Campaign,
    Item,
    Picture,
    Refused,
    picture_uid,
)
from rlalign.ballots.store import Store
from rlalign.core.registry import UserError
from tests.ballots import crowd
from tests.ballots.conftest import KINDS


@pytest.fixture(params=KINDS)
def empty(request: pytest.FixtureRequest, empty_place: Callable[..., str]) -> str:
    """A place without a store, one on each kind of database."""
    return empty_place(request.param)


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    opened = Store.open(place)
    yield opened
    opened.close()


def item(number: int, **other: object) -> Item:
    made = Item(
        id=f"i{number}", campaign="c", caption="a caption", uids=(f"{number}a", f"{number}b")
    )
    return replace(made, **other)  # type: ignore[arg-type]


def begin(store: Store, *items: Item, people: int = 1, mode: str = "pairs") -> list[str]:
    store.create_campaign(Campaign(id="c", mode=mode, settings={"votes": 3}))  # type: ignore[arg-type]
    store.add_items(items)
    return [store.join(f"p{n}", f"t{n}", "1", 0.0).id for n in range(people)]


def answer(nonce: str = "n", choice: str = "left", **other: object) -> Answer:
    return replace(Answer(nonce=nonce, choice=choice), **other)  # type: ignore[arg-type]


@pytest.mark.promise
def test_two_hundred_people_lose_no_vote_and_cast_none_twice(place: str) -> None:
    """Over two stores of one place, as two processes of a page would; items want two votes each,
    so that many are asked of two people at once."""
    stores = [Store.open(place), Store.open(place)]
    people = crowd.gather(stores[0], people=200, items=110, target=2)
    tally = crowd.Tally()
    crowd.vote_together(stores, people, each=1, tally=tally)
    assert len(tally.seqs) == 200
    assert crowd.lost_and_doubled(stores[1], tally) == (0, 0)
    assert sorted(tally.seqs.values()) == list(range(1, 201))
    asked = Counter(v.ballot.item.id for v in stores[0].votes(crowd.CAMPAIGN))
    assert max(asked.values()) == 2
    assert audit(stores[0], crowd.CAMPAIGN) == []
    for one in stores:
        one.close()


def test_a_store_that_is_opened_again_is_the_same(place: str) -> None:
    first = Store.open(place)
    (person,) = begin(first, item(0))
    ballot = first.issue("c", person, 5.0, Deal())
    assert ballot is not None
    said = answer(
        reasons=("looks",),
        points=((1, 0.25, 0.5),),
        visible_ms=900.0,
        decide_ms=400.5,
        device={"keys": True, "width": 390},
    )
    first.vote(person, ballot.id, said, 6.0)
    first.close()

    again = Store.open(place)
    (vote,) = again.votes("c")
    assert (vote.ballot, vote.answer, vote.at, vote.seq) == (ballot, said, 6.0, 1)
    assert vote.best == ballot.shown[0]
    assert again.campaign("c") == Campaign(id="c", mode="pairs", settings={"votes": 3})
    assert again.campaigns() == [again.campaign("c")]
    again.close()


def test_the_migrations_make_the_schema_that_the_code_uses(empty: str) -> None:
    Store.open(empty).close()
    engine = connect.connect(empty)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.METADATA) == []
    engine.dispose()


def test_a_store_of_the_first_schema_is_brought_up_to_date(empty: str) -> None:
    """A clip in it has no rate."""
    engine = connect.connect(empty)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE picture DROP COLUMN rate")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
        connection.exec_driver_sql(
            "INSERT INTO picture (uid, caption, policy, seed, plan, frames, media_type)"
            " VALUES ('u', 'a ball', 'p', 0, '{}', 9, 'image/webp')"
        )
    engine.dispose()
    store = Store.open(empty)
    picture = store.picture("u")
    assert picture is not None and (picture.frames, picture.rate) == (9, 0.0)
    store.close()


def open_and_close(place: str) -> None:
    Store.open(place).close()


@pytest.mark.promise
def test_processes_that_open_a_new_store_at_once_make_it_once(empty: str) -> None:
    processes = multiprocessing.get_context("forkserver")
    started = [processes.Process(target=open_and_close, args=(empty,)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 3


def test_a_store_of_a_newer_rlalign_is_refused(place: str) -> None:
    Store.open(place).close()
    engine = connect.connect(place)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(UserError, match="newer rlalign .schema 9999."):
        Store.open(place)


def test_another_programs_database_is_refused_and_left_alone(empty: str) -> None:
    engine = sa.create_engine(connect._url(empty))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE theirs (a INTEGER)")
    with pytest.raises(UserError, match="with the table 'theirs'"):
        Store.open(empty)
    assert sa.inspect(engine).get_table_names() == ["theirs"]
    engine.dispose()


def test_a_committed_vote_is_on_the_disk(store: Store) -> None:
    """As each database is told: it waits for the disk before it says that it has committed."""
    with store.reading() as connection:
        name = connection.dialect.name
        ask = "PRAGMA synchronous" if name == "sqlite" else "SHOW synchronous_commit"
        assert connection.exec_driver_sql(ask).scalar() == (2 if name == "sqlite" else "on")


def test_pictures_are_kept_by_their_bytes(store: Store) -> None:
    content = bytes(range(256)) * 300
    picture = Picture(
        uid=picture_uid(content), caption="été", policy="base", seed=2**62, plan={"steps": 4}
    )
    store.add_picture(picture, content)
    store.add_picture(replace(picture, caption="another"), content)
    assert store.picture(picture.uid) == picture
    assert store.content(picture.uid) == content
    assert store.picture("x") is None
    assert store.content("x") is None


def test_repeats_swap_the_sides_and_gold_never_comes_alone(store: Store) -> None:
    (person,) = begin(
        store, *(item(n) for n in range(30)), item(90, kind="gold", truth="90a", target=0)
    )
    deal = Deal(gold=0.3, repeat=0.3, shared=0.0, repeat_after=3)
    ballots = {}
    while ballot := store.issue("c", person, 0.0, deal):
        ballots[ballot.id] = ballot
        store.vote(person, ballot.id, answer(), 0.0)
    kinds = Counter(one.item.kind for one in ballots.values())
    assert kinds["live"] == 30
    assert kinds["gold"] == 1
    assert kinds["repeat"] > 5
    for one in ballots.values():
        if one.item.kind == "repeat":
            first = ballots[one.item.of_ballot]
            assert one.shown == first.shown[::-1]
            assert one.number - first.number >= 3
    last = list(ballots.values())[-1]
    assert last.item.kind == "live", "when nothing live is left there is no gold or repeat either"


def test_shares_and_propensities_are_as_stated(store: Store) -> None:
    """80 ballots: each kind's count within four standard deviations, each propensity exact."""
    items = [item(n) for n in range(100)]
    items += [item(300 + n, kind="gold", truth=f"{300 + n}a", target=0) for n in range(50)]
    items += [item(500 + n, kind="shared", target=9) for n in range(50)]
    (person,) = begin(store, *items)
    deal = Deal(gold=0.2, repeat=0.0, shared=0.2)
    kinds: Counter[str] = Counter()
    for number in range(80):
        ballot = store.issue("c", person, 0.0, deal)
        assert ballot is not None
        live = 100 - kinds["live"]
        shares = {"gold": 0.2 / (50 - kinds["gold"]), "shared": 0.2 / (50 - kinds["shared"])}
        expected = {**shares, "live": 0.6 / live}[ballot.item.kind]
        assert ballot.propensity == pytest.approx(expected)
        kinds[ballot.item.kind] += 1
        store.vote(person, ballot.id, answer(f"n{number}"), 0.0)
    assert abs(kinds["gold"] - 16) < 4 * (80 * 0.2 * 0.8) ** 0.5
    assert abs(kinds["live"] - 48) < 4 * (80 * 0.6 * 0.4) ** 0.5


def test_sides_are_drawn_anew_for_each_person_and_ballot(store: Store) -> None:
    people = begin(store, *(item(n, target=0) for n in range(25)), people=2)
    first = Counter()
    for person in people:
        while ballot := store.issue("c", person, 0.0, Deal(repeat=0.0)):
            first[ballot.order[0]] += 1
            store.vote(person, ballot.id, answer(), 0.0)
    assert first[0] + first[1] == 50
    assert abs(first[0] - 25) < 4 * 50**0.5 / 2  # four standard deviations


def test_a_skip_leaves_the_pair_to_others(store: Store) -> None:
    ann, bob = begin(store, item(0), people=2)
    ballot = store.issue("c", ann, 0.0, Deal())
    assert ballot is not None
    assert store.issue("c", bob, 0.0, Deal()) is None, "one vote is wanted, and one is asked for"
    store.vote(ann, ballot.id, answer(choice="skip"), 0.0)
    assert store.issue("c", ann, 0.0, Deal()) is None, "who skipped is not asked again"
    assert store.issue("c", bob, 0.0, Deal()) is not None


def test_an_item_for_one_person_is_asked_of_nobody_else(store: Store) -> None:
    ann, bob = begin(store, people=2)
    store.add_items([item(0, annotator=bob), item(1, annotator=bob)])
    store.withdraw_items(["i1"])
    assert store.issue("c", ann, 0.0, Deal()) is None
    ballot = store.issue("c", bob, 0.0, Deal())
    assert ballot is not None
    assert ballot.item.id == "i0"
    assert store.issue("c", bob, 0.0, Deal(), ahead=1) is None


def test_what_was_put_together_for_one_person_can_be_taken_back(store: Store) -> None:
    ann, bob = begin(store, people=2)
    plain = Deal(gold=0.0, repeat=0.0, shared=0.0)
    store.add_items([item(0, annotator=ann), item(1, annotator=bob)])
    answered = store.issue("c", ann, 0.0, plain)
    assert answered is not None
    store.vote(ann, answered.id, answer(), 1.0)

    # of three that came after it one is dealt, one waits, and one is kept
    store.add_items([item(number, annotator=ann) for number in (2, 3, 4)])
    dealt = store.issue("c", ann, 2.0, plain)
    assert dealt is not None
    kept = next(f"i{number}" for number in (2, 3, 4) if f"i{number}" != dealt.item.id)
    store.withdraw_own("c", ann, keep=kept)
    assert audit(store, "c") == []
    assert store.stock("c", 3.0).items == {"live": 2}, "the kept one, and that of somebody else"
    with pytest.raises(Refused, match="waited too long"):
        store.vote(ann, dealt.id, answer("late"), 4.0)
    following = store.issue("c", ann, 5.0, plain)
    assert following is not None and following.item.id == kept
    assert [vote.ballot.id for vote in store.votes("c")] == [answered.id], "votes stay"
    theirs = store.issue("c", bob, 6.0, plain)
    assert theirs is not None and theirs.item.id == "i1"


def test_who_is_left_out_gives_the_places_back_and_may_return(store: Store) -> None:
    ann, bob = begin(store, item(0), people=2)
    ballot = store.issue("c", ann, 0.0, Deal())
    assert ballot is not None
    store.vote(ann, ballot.id, answer(), 0.0)
    store.set_status(ann, "left_out", "too quick", 1.0)
    before = store.cursor()
    with pytest.raises(Refused) as refused:
        store.issue("c", ann, 2.0, Deal())
    assert refused.value.reason == "left_out"
    assert store.issue("c", bob, 2.0, Deal()) is not None, "the pair wants a vote again"
    assert [vote.ballot.id for vote in store.votes("c")] == [ballot.id], "no vote is deleted"
    store.set_status(ann, "active", "", 3.0)
    assert store.standings(before) == {ann: "left_out"}
    assert store.standings(store.cursor()) == {ann: "active"}
    assert audit(store, "c") == []


def test_votes_are_deleted_on_request(store: Store, place: str) -> None:
    ann, bob = begin(store, *(item(n) for n in range(4)), people=2)
    for person in (ann, bob):
        ballot = store.issue("c", person, 0.0, Deal())
        assert ballot is not None
        store.vote(person, ballot.id, answer(reasons=(f"reason {person}",)), 0.0)
    number = store.add_prompt("c", ann, "secret words", 0.0)
    assert store.prompts("c", ann) == [(number, "secret words")]
    assert store.delete_votes_of(ann, 1.0) == 1
    assert store.delete_votes_of(ann, 1.0) == 0
    assert [vote.ballot.annotator for vote in store.votes("c")] == [bob]
    assert store.prompts("c") == []
    assert store.annotator_of("t0") is None
    assert {one.id: one.name for one in store.annotators()} == {ann: "", bob: "p1"}
    assert audit(store, "c") == []
    assert store.stock("c", 1.0).items == {"live": 3}
    with pytest.raises(Refused):
        store.set_status(ann, "active", "", 2.0)
    assert store.join("new", "t0", "1", 3.0).id not in (ann, bob)


def test_a_cursor_gives_the_same_votes_for_ever(store: Store) -> None:
    (person,) = begin(store, *(item(n) for n in range(6)))
    seen = {}
    for number in range(6):
        ballot = store.issue("c", person, 0.0, Deal(repeat=0.0))
        assert ballot is not None
        store.vote(person, ballot.id, answer(f"n{number}"), 0.0)
        if number % 2:
            store.undo("c", person, f"u{number}", 0.0)
            store.vote(person, ballot.id, answer(f"again{number}", "right"), 0.0)
        at = store.cursor()
        seen[at] = [vote.seq for vote in store.votes("c")]
    for at, votes in seen.items():
        assert [vote.seq for vote in store.votes("c", upto=at)] == votes
        assert [v.seq for v in store.votes("c", after=3, upto=at)] == [v for v in votes if v > 3]
    assert [v.answer.choice for v in store.votes("c")] == ["left", "right"] * 3


def test_ranks_are_votes_too(store: Store) -> None:
    (person,) = begin(store, item(0, uids=("a", "b", "c")), mode="rank")
    ballot = store.issue("c", person, 0.0, Deal())
    assert ballot is not None
    for bad in (
        answer(choice="left"),
        answer(choice="rank"),
        answer(choice="rank", ranking=((0, 1), (1, 2))),
        answer(choice="rank", ranking=((0, 1, 2), ())),
    ):
        with pytest.raises(Refused) as refused:
            store.vote(person, ballot.id, bad, 0.0)
        assert refused.value.reason == "bad_choice"
    store.vote(person, ballot.id, answer(choice="rank", ranking=((2,), (0, 1))), 0.0)
    (vote,) = store.votes("c")
    assert vote.groups == ((ballot.shown[2],), (ballot.shown[0], ballot.shown[1]))
    assert vote.best == ballot.shown[2]


@pytest.mark.parametrize(
    "bad",
    [
        answer(nonce=""),
        answer(nonce="n" * 65),
        answer(choice="rank"),
        answer(choice="both"),
        answer(ranking=((0,), (1,))),
        answer(reasons=("r" * 65,)),
        answer(reasons=("r",) * 17),
        answer(points=((2, 0.5, 0.5),)),
        answer(points=((0, 1.5, 0.5),)),
        answer(points=((0, float("nan"), 0.5),)),
        answer(visible_ms=-1.0),
        answer(decide_ms=float("inf")),
        answer(device={"a": "x" * 3000}),
    ],
)
def test_an_answer_that_cannot_be_one_is_refused(
    bad: Answer, new_place: Callable[[str], str]
) -> None:
    store = Store.open(new_place("sqlite"))
    (person,) = begin(store, item(0))
    ballot = store.issue("c", person, 0.0, Deal())
    assert ballot is not None
    with pytest.raises(Refused) as refused:
        store.vote(person, ballot.id, bad, 0.0)
    assert refused.value.reason == "bad_choice"
    assert list(store.votes("c")) == []
    store.close()


def test_strangers_are_refused(store: Store) -> None:
    begin(store, item(0))
    with pytest.raises(Refused) as refused:
        store.issue("c", "nobody", 0.0, Deal())
    assert refused.value.reason == "unknown_annotator"
    with pytest.raises(Refused) as refused:
        store.vote("nobody", "no ballot", answer(), 0.0)
    assert refused.value.reason == "unknown_ballot"
    with pytest.raises(UserError, match="mode pairs, got rank"):
        store.create_campaign(Campaign(id="c", mode="rank"))


def test_a_place_that_is_none_is_one_message(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bad")
    text = folder / "notes.txt"
    text.write_text("no database" * 100)
    for place, said in (
        ("", "path or a PostgreSQL URL"),
        ("mysql://a@b/c", "postgresql://USER@HOST/DATABASE"),
        ("postgresql://user:secret@localhost:1/votes", "cannot be opened"),
        (str(text), "cannot be opened as a store"),
        (str(text / "below"), "cannot be made"),
        (str(folder), "cannot be opened"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            Store.open(place)
        assert "secret" not in str(refused.value)
    assert text.read_text() == "no database" * 100


def test_the_file_is_an_ordinary_database(new_place: Callable[[str], str]) -> None:
    place = new_place("sqlite")
    store = Store.open(place)
    (person,) = begin(store, item(0))
    ballot = store.issue("c", person, 0.0, Deal())
    assert ballot is not None
    store.vote(person, ballot.id, answer(), 0.0)
    with sqlite3.connect(place) as plain:
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert plain.execute("SELECT seq, choice FROM vote").fetchall() == [(1, "left")]
    plain.close()
    store.close()
