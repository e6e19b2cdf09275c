"""The page in a real browser when things go wrong, by every hand in every mode: cut connections,
killed servers, two people, second tabs, pictures that are not there yet."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlalign.ballots.audit import audit
from rlalign.ballots.records import Item
from rlalign.ballots.store import Store
from rlalign.voting.sources.files import as_shown
from rlalign.web.vote.ballots_desk import PictureList, Supply
from rlalign.web.vote.people import join_url
from rlalign.web.vote.serving import ADMIN_ENV
from tests.web.vote.made_desk import Process, Served, fill
from tests.web.vote.person import Person
from tests.web.vote.visitor import TELEPHONE, Visitor, accessibility_findings, visiting

pytestmark = pytest.mark.promise

Make = Callable[..., Served]
CUT = "Failed to load resource"


def votes_of(page: Served) -> list:
    return list(page.store.votes("shapes"))


# --- every mode by every hand ---------------------------------------------------------------------


def vote_by(visitor: Visitor, hand: str, mode: str) -> None:
    """One vote for the left picture, or for a ranking from left to right."""
    if mode == "rank":
        for place in range(3):
            act(visitor, hand, str(place + 1), f".picture >> nth={place}")
        visitor.after(lambda: act(visitor, hand, "Enter", visitor.choose("rank")))
    else:
        visitor.after(lambda: act(visitor, hand, "ArrowLeft", ".picture >> nth=0"))


def act(visitor: Visitor, hand: str, key: str, what: str) -> None:
    if hand == "key":
        visitor.press(key)
    elif hand == "mouse":
        visitor.click(what)
    else:
        visitor.tap(what)


FIRST = {
    ("pairs", "key"),
    ("pairs", "touch"),
    ("chain", "touch"),
    ("rank", "mouse"),
    ("ab", "key"),
}
"""Each mode and each hand once; what they make together is left to the long tests."""


@pytest.mark.parametrize(
    ("mode", "hand"),
    [
        pytest.param(*pair, marks=() if pair in FIRST else pytest.mark.slow)
        for pair in itertools.product(["pairs", "chain", "rank", "ab"], ["key", "mouse", "touch"])
    ],
)
def test_each_mode_by_each_hand(browser: Any, serve_page: Make, mode: str, hand: str) -> None:
    page = serve_page(mode, {"count": 3 if mode == "rank" else 2})
    how = {"viewport": TELEPHONE, "has_touch": True, "is_mobile": True} if hand == "touch" else {}
    with visiting(browser, page.url, **how) as visitor:
        if mode == "chain":
            visitor.wait_for("What shall be drawn?")
            act(visitor, hand, "n", "#ask-next") if hand != "key" else visitor.click("#ask-next")
        visitor.settle()
        vote_by(visitor, hand, mode)

        # taken back, given again, and again after a reload
        with visitor.tab.expect_response("**/undo"):
            act(visitor, hand, "u", '[data-do="undo"]')
        visitor.settle()
        vote_by(visitor, hand, mode)
        visitor.tab.reload()
        visitor.settle()
        vote_by(visitor, hand, mode)
        assert accessibility_findings(visitor.tab) == []

    answers = [vote.answer for vote in votes_of(page)]
    assert len(answers) == 2
    assert {answer.device["input"] for answer in answers} == {hand}
    wanted = ((0,), (1,), (2,)) if mode == "rank" else ()
    assert {answer.ranking for answer in answers} == {wanted}
    assert audit(page.store, "shapes") == []


@pytest.mark.parametrize("size", [(320, 568), (360, 740), (844, 390), (820, 1180), (2560, 1300)])
def test_it_fits_on_screens_of_every_size(
    browser: Any, serve_page: Make, size: tuple[int, int]
) -> None:
    page = serve_page("rank", {"count": 6})
    width, height = size
    with visiting(browser, page.url, viewport={"width": width, "height": height}) as visitor:
        visitor.settle()
        across, down = visitor.tab.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        )
        assert across <= width
        assert down <= max(height, 740), "only the smallest are scrolled"
        boxes = [one.bounding_box() for one in visitor.tab.query_selector_all(".picture")]
        assert len({round(box["width"]) for box in boxes}) == 1
        assert min(box["width"] for box in boxes) > 80


# --- keys for what a mouse does -------------------------------------------------------------------


def test_marks_and_zoom_by_keys(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        visitor.press("z")
        visitor.press("Shift+ArrowRight")
        visitor.press("Shift+ArrowDown")
        origin = visitor.tab.evaluate(
            "getComputedStyle(document.querySelector('#board')).getPropertyValue('--zoom-x')"
        )
        assert origin == "60%"
        visitor.press("Escape")
        visitor.press("m")
        visitor.press("ArrowRight")
        visitor.press("ArrowUp")
        visitor.press("Enter")
        visitor.press("Tab")
        visitor.press("Enter")
        visitor.press("Enter")  # the same place again takes it back
        visitor.press("Escape")
        visitor.after(lambda: visitor.press("ArrowRight"))
        (vote,) = votes_of(page)
        assert vote.answer.points == ((0, 0.55, 0.45),)


# --- several people, several tabs -----------------------------------------------------------------


def test_two_people_at_once_never_share_a_ballot(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    with visiting(browser, page.url) as one, visiting(browser, page.url) as two:
        for visitor in (one, two):
            visitor.settle()
        for key in ("ArrowLeft", "ArrowRight", "ArrowDown"):
            one.after(lambda key=key: one.press(key))
            two.after(lambda key=key: two.press(key))
        first, second = (person.id for person in page.store.annotators())
        given = [(vote.ballot.annotator, vote.answer.choice) for vote in votes_of(page)]
        assert given == [
            (person, choice) for choice in ("left", "right", "tie") for person in (first, second)
        ]
        assert one.tab.inner_text("#progress-words") == "3 of 10"


def test_a_second_tab_shows_the_same_ballot_and_does_no_harm(
    browser: Any, serve_page: Make
) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        other = visitor.context.new_page()
        other.goto(page.url)
        other.wait_for_selector("#board[data-open=true]")
        assert other.inner_text("#prompt") == visitor.prompt
        with other.expect_response("**/vote"):
            other.keyboard.press("ArrowRight")
        other.wait_for_selector("#board[data-open=true]")
        shown = other.inner_text("#prompt")
        other.close()

        # the first tab still has what was answered; it says so and goes on
        with visitor.tab.expect_response("**/ballot"):
            visitor.tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        visitor.tab.wait_for_selector(f"#prompt:text-is('{shown}')")
        visitor.settle()
        assert [vote.answer.choice for vote in votes_of(page)] == ["right"]
        visitor.after(lambda: visitor.press("ArrowLeft"))
        assert len(votes_of(page)) == 2


def test_a_vote_on_what_another_tab_answered_changes_nothing(
    browser: Any, serve_page: Make
) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        same = Person(page.url)
        same.session.cookies.clear()
        for cookie in visitor.context.cookies():
            same.session.cookies.set(cookie["name"], cookie["value"])
        same.vote(same.ballot()["ballot"], "tie")
        visitor.after(lambda: visitor.press("ArrowLeft"))
        assert visitor.tab.inner_text("#live").startswith("This one was answered already")
        assert [vote.answer.choice for vote in votes_of(page)] == ["tie"]


# --- connections that are slow or cut -------------------------------------------------------------


def test_on_a_slow_connection_nothing_is_voted_on_unseen(browser: Any, serve_page: Make) -> None:
    page = serve_page("pairs", {"side": 512})
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        session = visitor.context.new_cdp_session(visitor.tab)
        session.send(
            "Network.emulateNetworkConditions",
            {"offline": False, "latency": 300, "downloadThroughput": 4e5, "uploadThroughput": 4e5},
        )
        shown = visitor.pictures
        for count in (1, 2):
            for _ in range(5):  # impatient: only the first is for these pictures
                visitor.press("ArrowLeft")
            visitor.tab.wait_for_selector(f"#progress-words:text-is('{count} of 10')")
            visitor.settle()
        assert set(visitor.pictures).isdisjoint(shown)
        first, second = votes_of(page)
        assert first.ballot.id != second.ballot.id


def test_a_choice_waits_for_its_answer_without_a_second_one(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        held = []
        visitor.tab.route("**/vote", lambda route: held.append(route))
        visitor.press("ArrowLeft")
        visitor.tab.wait_for_selector("body[data-state=sending]")
        visitor.press("ArrowRight")
        visitor.click(".picture >> nth=1", force=True)
        visitor.press("u")
        assert len(held) == 1
        visitor.after(held[0].continue_)
        visitor.tab.unroute("**/vote")
        assert [vote.answer.choice for vote in votes_of(page)] == ["left"]


def test_a_lost_connection_is_said_and_the_vote_sent_later(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        visitor.expected = CUT
        visitor.settle()
        visitor.context.set_offline(True)
        visitor.press("ArrowLeft")
        visitor.tab.wait_for_selector("#lost:not([hidden])")
        assert votes_of(page) == []
        visitor.context.set_offline(False)
        visitor.settle()
        assert not visitor.tab.is_visible("#lost")
        assert [vote.answer.choice for vote in votes_of(page)] == ["left"]


def test_a_vote_that_was_never_answered_outlives_a_reload(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        visitor.expected = CUT
        visitor.settle()
        visitor.tab.route("**/vote", lambda route: route.abort())
        visitor.press("ArrowRight")
        visitor.tab.wait_for_selector("#lost:not([hidden])")
        visitor.tab.unroute("**/vote")
        visitor.after(visitor.tab.reload)
        assert [vote.answer.choice for vote in votes_of(page)] == ["right"]


def test_a_server_killed_between_a_vote_and_its_answer_loses_and_doubles_nothing(
    browser: Any, tmp_path: Path
) -> None:
    process = Process(tmp_path / "votes.sqlite", tmp_path / "secret")
    process.start()
    keys = ["ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp", "ArrowLeft", "ArrowRight"]
    with visiting(browser, process.url) as visitor:
        visitor.expected = CUT
        visitor.settle()

        def record_and_kill(route: Any) -> None:
            assert route.fetch().status == 200, "the vote was taken"
            process.kill()
            route.abort()

        def kill_before(route: Any) -> None:
            process.kill()
            route.abort()

        for number, key in enumerate(keys):
            cut = {1: record_and_kill, 3: kill_before, 4: record_and_kill}.get(number)
            if cut is None:
                visitor.after(lambda key=key: visitor.press(key))
                continue
            visitor.tab.route("**/vote", cut, times=1)
            visitor.press(key)
            visitor.tab.wait_for_selector("#lost:not([hidden])")
            process.start()
            visitor.tab.wait_for_selector(f"#progress-words:text-is('{number + 1} of 10')")
            visitor.settle()
    process.kill()
    store = Store.open(tmp_path / "votes.sqlite")
    choices = [vote.answer.choice for vote in store.votes("shapes")]
    assert audit(store, "shapes") == []
    store.close()
    assert choices == ["left", "right", "tie", "both_bad", "left", "right"]


# --- joining, waiting, results --------------------------------------------------------------------


def test_a_join_link_asks_for_consent_and_leaves_no_token_behind(
    browser: Any, serve_page: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADMIN_ENV, "an-administrator-of-a-test")
    page = serve_page(with_token=True)
    text = {"consent": "Your votes train a model.\nThey are kept.", "consent_version": "2026-11"}
    page.desk.about = replace(page.desk.about, **text)
    with visiting(browser, page.url) as nobody:
        nobody.tab.wait_for_selector("#join-error:not([hidden])")
        assert "needs a join link" in nobody.tab.inner_text("#join-error")
        assert accessibility_findings(nobody.tab) == []
    token = page.secret.invitation()
    with visiting(browser, join_url(page.url, token)) as visitor:
        visitor.url = page.url
        visitor.tab.wait_for_selector("#join:visible")
        assert token not in visitor.tab.url
        visitor.tab.reload()
        visitor.tab.fill("#join-name", "Grace")
        visitor.tab.check("#join-consent")
        visitor.click("#join button.main")
        visitor.settle()
        assert [(one.name, one.consent) for one in page.store.annotators()] == [
            ("Grace", "2026-11")
        ]
        assert all(token not in asked for asked in visitor.asked[1:])


class Drawing(PictureList):
    """A source that says what the test has it say."""

    said: Supply = Supply(code="drawing", made=1, to_make=4)

    def supply(self, prompt: str) -> Supply:
        return self.said


def test_it_says_which_round_learns_and_from_which_votes(
    browser: Any, serve_page: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = serve_page()
    page.desk.source = Drawing()
    monkeypatch.setattr(Drawing, "said", Supply(round=3))
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        words = "#progress-words"
        assert visitor.tab.inner_text(words).endswith("round 3 learns from these votes")
        monkeypatch.setattr(Drawing, "said", Supply(round=3, votes=(101, 200)))
        page.desk.notice.ring()
        learning = "round 3 is learning from votes 101 to 200"
        visitor.tab.wait_for_selector(f"{words}:has-text('{learning}')")
        assert accessibility_findings(visitor.tab) == []


def test_it_says_why_there_are_no_pictures_and_goes_on_by_itself(
    browser: Any, serve_page: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = serve_page("pairs", {"items": 0})
    page.desk.source = Drawing()
    with visiting(browser, page.url) as visitor:
        visitor.wait_for("Pictures are being drawn")
        assert "1 of 4 are ready" in visitor.tab.inner_text("#wait-words")
        assert accessibility_findings(visitor.tab) == []
        monkeypatch.setattr(Drawing, "said", Supply(code="broken", words="no worker is left"))
        page.desk.notice.ring()
        visitor.wait_for("There are no pictures now")
        assert "no worker is left" in visitor.tab.inner_text("#wait-words")
        fill(page.store, "pairs", items=2)
        page.desk.notice.ring()
        visitor.settle()
        for _ in range(2):
            with visitor.tab.expect_response("**/vote"):
                visitor.press("ArrowLeft")
            visitor.tab.wait_for_selector("body[data-state=open], body[data-state=waiting]")
        visitor.wait_for("There are no pictures now")


def test_clips_play(browser: Any, serve_page: Make) -> None:
    page = serve_page("pairs", {"items": 0})
    clips = []
    for colour in ("red", "blue"):
        frames = [Image.new("RGB", (64, 64), name) for name in (colour, "white")]
        file = io.BytesIO()
        frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=50, loop=0)
        clips.append(as_shown(file.getvalue(), "clip", caption="a light that blinks"))
        page.store.add_picture(clips[-1].picture, clips[-1].content)
    assert [clip.picture.frames for clip in clips] == [2, 2]
    uids = tuple(clip.picture.uid for clip in clips)
    item = Item(id="clips", campaign="shapes", caption="a light that blinks", uids=uids)
    page.store.add_items([item])
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        for place in (0, 1):
            picture = visitor.tab.locator(f".picture >> nth={place}")
            first = picture.screenshot()
            while picture.screenshot() == first:
                pass  # until another frame is shown
        visitor.press("ArrowLeft")
        visitor.wait_for("That was all. Thank you!")
        assert [vote.answer.choice for vote in votes_of(page)] == ["left"]


def test_who_has_given_no_vote_is_not_thanked_for_it(browser: Any, serve_page: Make) -> None:
    with visiting(browser, serve_page("pairs", {"items": 0}).url) as visitor:
        visitor.wait_for("There is nothing to choose from now")
        assert not visitor.tab.is_visible("#wait-undo")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_results_are_shown_after_the_token(
    browser: Any, serve_page: Make, monkeypatch: pytest.MonkeyPatch, theme: str
) -> None:
    monkeypatch.setenv(ADMIN_ENV, "an-administrator-of-a-test")
    page = serve_page("ab", with_token=True)
    for name in ("Ada", "<i>Grace</i>"):
        person = Person(page.url, token=page.secret.invitation(), name=name)
        for choice in ("left", "right", "left", "tie", "skip"):
            person.vote(person.ballot()["ballot"], choice)
    with visiting(browser, page.url, color_scheme=theme) as visitor:
        visitor.expected = CUT  # 401 for the form
        visitor.see("/results")
        assert accessibility_findings(visitor.tab) == []
        visitor.tab.fill("input[name=token]", "an-administrator-of-a-test")
        visitor.press("Enter")
        visitor.tab.wait_for_selector(".cards")
        text = visitor.tab.inner_text("main")
        assert "<i>Grace</i>" in text and "policy A" in text and "2 skipped" in text
        assert accessibility_findings(visitor.tab) == []
