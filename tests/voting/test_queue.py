"""The queue: pairs ahead of those who vote, words where there are none, a filter, typed prompts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlalign.ballots.records import Campaign, Stock
from rlalign.ballots.store import Store
from rlalign.core.registry import UserError, build
from rlalign.voting import queue as queues
from rlalign.voting.filter import PictureFilter
from rlalign.voting.pairing import Pairing
from rlalign.voting.pictures import Exhausted, Pending, PictureFile
from rlalign.voting.queue import Queue
from rlalign.voting.settings import Filter, Vote, parse_vote
from tests.votes import png


class Counted:
    """Grey pictures, a batch of four captions each time; ``ends`` batches and no more."""

    draws = True
    renewed = False
    round: int | None = None
    votes: tuple[int, int] | None = None

    def __init__(self, ends: int = 100) -> None:
        self.ends = ends
        self.number = 0
        self.raises: Exception | None = None

    def prompts(self) -> Sequence[str]:
        return ["a", "b"]

    def take_up(self, plans: Iterator[Mapping[str, Any]]) -> None:
        self.number = int(next(plans, {}).get("batch", -1)) + 1

    def batch(self) -> list[list[PictureFile]]:
        if self.raises is not None:
            raise self.raises
        if self.number >= self.ends:
            raise Exhausted
        self.number += 1
        batch = self.number - 1
        return [self.group(f"c{n}", 8 * batch + 2 * n, {"batch": batch}) for n in range(4)]

    def of_prompt(self, prompt: str, number: int) -> list[PictureFile]:
        if prompt == "no":
            raise Exhausted
        return self.group(prompt, 100 + 2 * number, {})

    def group(self, caption: str, value: int, plan: Mapping[str, Any]) -> list[PictureFile]:
        return [PictureFile.of(png(value + k), caption=caption, plan=plan) for k in (0, 1)]

    def close(self) -> None:
        pass


def settings(**changes: object) -> Vote:
    data = {
        "name": "q",
        "source": {"policy": "tiny"},
        "prompts": {"name": "shapes"},
        "ahead": 8,
        "low": 4,
        "shares": {"gold": 0.1, "repeat": 0.0, "shared": 0.0},
    }
    return parse_vote({**data, **changes})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.open(tmp_path / "votes.db")
    store.create_campaign(Campaign(id="q", mode="pairs"))
    return store


@pytest.fixture
def make(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Queue]]:
    """Starts queues, and ends them."""
    monkeypatch.setattr(queues, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(queues, "AGAIN_SECONDS", (0.02,))
    made: list[Queue] = []

    def start(source: Counted, vote: Vote | None = None, **changes: Any) -> Queue:
        vote = vote or settings()
        parts = {"store": store, "vote": vote, "source": source, "pairing": Pairing(vote=vote)}
        queue = Queue(**{**parts, **changes})
        queue.start()
        made.append(queue)
        return queue

    yield start
    for queue in made:
        queue.close()


def until(condition: Callable[[], bool]) -> None:
    """Waits for another thread, for as long as it takes."""
    while not condition():
        time.sleep(0.01)


def waiting(store: Store) -> int:
    return store.stock("q", 0.0).items.get("live", 0)


def test_it_keeps_pairs_ahead_and_goes_on_after_a_restart(
    store: Store, make: Callable[..., Queue]
) -> None:
    first = Counted()
    queue = make(first)
    until(lambda: waiting(store) >= 8)
    queue.close()
    assert waiting(store) == 8, "two batches of four, and no more"
    captions = [item.caption for item in store.items("q") if item.kind == "live"]
    assert captions == ["c0", "c1", "c2", "c3"] * 2

    # gold items ask for a picture of the caption against one of another
    gold = [item for item in store.items("q") if item.kind == "gold"]
    assert len(gold) == 2
    for item in gold:
        pictures = [store.picture(uid) for uid in item.uids]
        assert [p.caption == item.caption for p in pictures if p] == [True, False]
        assert item.truth == item.uids[0] and item.target == 0

    # another process goes on with the third batch
    second = Counted()
    store.withdraw_items([item.id for item in store.items("q")])
    make(second)
    until(lambda: waiting(store) >= 8)
    assert second.number == 4


class Noted:
    """A meter that keeps what it is told."""

    def __init__(self) -> None:
        self.stocks: list[Stock] = []
        self.seconds: list[float] = []

    def note_stock(self, stock: Stock) -> None:
        self.stocks.append(stock)

    def note_drawing(self, seconds: float) -> None:
        self.seconds.append(seconds)


def test_a_meter_is_told_how_the_campaign_stands(store: Store, make: Callable[..., Queue]) -> None:
    meter = Noted()
    make(Counted(), meter=meter)
    until(lambda: bool(meter.stocks) and meter.stocks[-1].items.get("live") == 8)
    assert meter.stocks[-1].votes == 0
    assert len(meter.seconds) == 2 and all(seconds >= 0 for seconds in meter.seconds)


def test_it_says_why_there_are_no_pictures_and_tries_again(
    store: Store, make: Callable[..., Queue]
) -> None:
    source = Counted()
    source.raises = UserError("the policy is broken")
    heard: list[str] = []
    queue = make(source, say=heard.append)
    until(lambda: queue.supply("").code == "broken" and bool(heard))
    assert queue.supply("").words == "the policy is broken"
    source.raises = Pending("learning")
    until(lambda: queue.supply("").code == "learning")
    source.raises = None
    until(lambda: waiting(store) >= 8)
    assert heard == ["no pictures: the policy is broken"], "said once"
    assert not queue.is_over


def test_it_ends_where_the_source_does(store: Store, make: Callable[..., Queue]) -> None:
    rings = threading.Event()
    queue = make(Counted(ends=1), ring=rings.set)
    until(lambda: queue.is_over)
    assert queue.supply("").code == "empty" and waiting(store) == 4
    assert rings.is_set()


def test_prompts_that_are_typed_get_pictures_of_their_own(
    store: Store, make: Callable[..., Queue]
) -> None:
    queue = make(Counted(), vote=settings(mode="chain"))
    queue.ask("a cat")
    until(lambda: len(queue.uids("a cat")) == 2)
    queue.ask("a cat")
    until(lambda: len(queue.uids("a cat")) == 4)
    assert all(store.content(uid) for uid in queue.uids("a cat"))
    queue.ask("no")
    until(lambda: queue.supply("no").code == "broken")
    assert "there are no pictures of 'no'" in queue.supply("no").words
    assert waiting(store) == 0, "a chain makes its own pairs"


def test_a_picture_below_the_threshold_reaches_nobody(
    store: Store, make: Callable[..., Queue]
) -> None:
    # jpeg: minus the size of the file; centroid would need no such picture
    reward = build("rewards", {"name": "function", "call": "tests.voting.test_queue:brightness"})
    filtering = PictureFilter(Filter(reward=reward, least=3.5 / 255))  # type: ignore[arg-type]
    make(Counted(ends=1), keep=filtering)
    until(lambda: waiting(store) == 2)
    until(lambda: filtering.held_back == 4)
    assert [item.caption for item in store.items("q") if item.kind == "live"] == ["c2", "c3"]
    shown = {uid for item in store.items("q") for uid in item.uids}
    assert shown and all(store.picture(uid) for uid in shown)


def brightness(media: Any, prompts: Sequence[str]) -> Any:
    """(B,) mean of the pixels."""
    return media.mean(dim=(1, 2, 3, 4))
