"""The page in a real browser, over a real server and store: the ways of voting, and that it can be
read and steered by everybody. ``test_more_in_browser.py`` has the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tests.web.vote.made_desk import Served
from tests.web.vote.visitor import TELEPHONE, WIDE, Visitor, accessibility_findings, visiting

pytestmark = pytest.mark.promise

Make = Callable[..., Served]


def answers_of(page: Served) -> list:
    return [vote.answer for vote in page.store.votes("shapes")]


def choices_of(page: Served) -> list[str]:
    return [answer.choice for answer in answers_of(page)]


def test_pairs_by_keys(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp", "s"):
            visitor.settle()
            before = visitor.pictures
            visitor.after(lambda key=key: visitor.press(key))
            assert set(visitor.pictures).isdisjoint(before)
        assert choices_of(page) == ["left", "right", "tie", "both_bad", "skip"]
        visitor.press("f")
        visitor.press("t")
        visitor.press("f")
        visitor.after(lambda: visitor.press("ArrowLeft"))
        last = answers_of(page)[-1]
        assert last.reasons == ("text",)
        assert last.device["input"] == "key"
        assert last.decide_ms >= 200 and last.visible_ms <= last.decide_ms + 1


def test_pairs_by_mouse_with_reasons_marks_and_undo(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        first = visitor.pictures
        visitor.after(lambda: visitor.click(".picture >> nth=1"))
        visitor.after(lambda: visitor.click(visitor.choose("tie")))
        assert choices_of(page) == ["right", "tie"]

        # back to the first, which is answered anew
        for _ in range(2):
            with visitor.tab.expect_response("**/undo"):
                visitor.click('[data-do="undo"]')
            visitor.settle()
        assert visitor.pictures == first
        visitor.click('[data-reason="looks"]')
        visitor.click('[data-do="mark"]')
        box = visitor.tab.query_selector(".picture").bounding_box()
        visitor.click(".picture >> nth=0", position={"x": box["width"] / 4, "y": box["height"] / 2})
        visitor.click('[data-do="mark"]')
        visitor.after(lambda: visitor.click(".picture >> nth=0"))
        (last,) = answers_of(page)
        assert (last.choice, last.reasons, last.device["input"]) == ("left", ("looks",), "mouse")
        ((place, x, y),) = last.points
        assert place == 0
        assert (x, y) == pytest.approx((0.25, 0.5), abs=0.01)


def test_pairs_by_touch_on_a_telephone(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    how = {"viewport": TELEPHONE, "has_touch": True, "is_mobile": True}
    with visiting(browser, page.url, **how) as visitor:
        visitor.settle()
        assert_fits(visitor)
        boxes = [one.bounding_box() for one in visitor.tab.query_selector_all(".picture")]
        assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"], "one above the other"
        assert visitor.tab.is_visible("text=Upper") and not visitor.tab.is_visible("text=Left")
        visitor.after(lambda: visitor.tap(".picture >> nth=1"))
        visitor.after(lambda: visitor.tap(visitor.choose("both_bad")))
        visitor.tap('[data-do="zoom"]')
        visitor.tap(".picture >> nth=0")  # moves what is enlarged
        visitor.tap('[data-do="zoom"]')
        visitor.after(lambda: visitor.tap(visitor.choose("left")))
        assert choices_of(page) == ["right", "both_bad", "left"]
        device = answers_of(page)[0].device
        assert (device["input"], device["layout"], device["width"]) == ("touch", "column", "narrow")


def assert_fits(visitor: Visitor) -> None:
    """Nothing has to be scrolled to, and every target is large enough for a finger."""
    size = visitor.tab.viewport_size
    for one in visitor.tab.query_selector_all("#board button:visible, .bar button, .bar select"):
        box = one.bounding_box()
        assert box["height"] >= 40 and box["width"] >= 40, one.inner_text()
        assert box["y"] + box["height"] <= size["height"], one.inner_text()


def test_rank_by_keys_and_mouse(browser: Any, serve_page: Make) -> None:
    page = serve_page("rank", {"count": 4, "items": 4})
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        visitor.press("Enter")  # there is nothing to send yet
        for key in ("3", "1", "1", "2", "4"):
            visitor.press(key)
        assert [medal.inner_text() for medal in visitor.tab.query_selector_all(".medal")] == [
            "#4",
            "#2",
            "#1",
            "#3",
        ]
        visitor.after(lambda: visitor.press("Enter"))
        for place in (1, 0, 3):
            visitor.click(f".picture >> nth={place}")
        visitor.after(lambda: visitor.click(visitor.choose("rank")))
        rankings = [answer.ranking for answer in answers_of(page)]
        assert rankings == [((2,), (1,), (3,), (0,)), ((1,), (0,), (3,), (2,))]


def test_a_place_in_a_ranking_is_taken_back(browser: Any, serve_page: Make) -> None:
    page = serve_page("rank", {"count": 3, "items": 2})
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        for key in ("2", "3"):
            visitor.press(key)
        medals = visitor.tab.locator(".medal")
        assert medals.all_inner_texts() == ["#3", "#1", "#2"], "the last one places itself"
        visitor.press("Backspace")
        assert medals.all_inner_texts() == ["#1"], "and goes with the one before it"
        visitor.click('[data-do="back"]')
        assert medals.count() == 0
        assert visitor.tab.is_disabled(visitor.choose("rank"))


def test_chain_with_a_typed_prompt_and_the_next_one(browser: Any, serve_page: Make) -> None:
    page = serve_page("chain")
    prompts = list(page.desk.source.prompts())
    with visiting(browser, page.url) as visitor:
        visitor.wait_for("What shall be drawn?")
        visitor.tab.fill("#ask-text", prompts[3])
        visitor.press("Enter")
        visitor.settle()
        assert visitor.prompt == prompts[3]
        winner = visitor.pictures[0]
        visitor.after(lambda: visitor.press("ArrowLeft"))
        assert winner in visitor.pictures
        with visitor.tab.expect_response("**/prompts"):
            visitor.press("n")
        visitor.settle()
        assert visitor.prompt == prompts[4]

        # what is typed is text, and letters in the field are no keys
        visitor.tab.fill("#ask-text", "<img src=x onerror=alert(1)> sun")
        visitor.click("#ask-send")
        visitor.wait_for("There are no pictures now")
        assert "<img src=x onerror=alert(1)> sun" in visitor.tab.inner_text("#wait-words")
        assert choices_of(page) == ["left"]


def test_two_policies_are_named_after_the_vote(browser: Any, serve_page: Make) -> None:
    page = serve_page("ab")
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        assert "policy" not in visitor.tab.content()
        visitor.after(lambda: visitor.press("ArrowRight"))
        (vote,) = page.store.votes("shapes")
        left, right = (page.store.picture(uid).policy for uid in vote.ballot.shown)
        assert visitor.tab.inner_text("#names") == f"Last pair: you chose {right}, not {left}."


def test_the_name_of_a_policy_moves_no_picture(browser: Any, serve_page: Make) -> None:
    with visiting(browser, serve_page("ab").url) as visitor:
        visitor.settle()
        before = visitor.tab.query_selector(".picture").bounding_box()
        visitor.after(lambda: visitor.press("ArrowRight"))
        assert visitor.tab.query_selector(".picture").bounding_box() == before
        visitor.after(lambda: visitor.press("s"))
        assert visitor.tab.inner_text("#names") == ""
        assert visitor.tab.query_selector(".picture").bounding_box() == before


@pytest.mark.parametrize("words", [40, 90])
def test_a_long_prompt_leaves_room_for_the_pictures(
    browser: Any, serve_page: Make, words: int
) -> None:
    page = serve_page()
    item = page.store.items("shapes")[0]
    caption = " ".join(["a robot"] * (words // 2))
    page.store.withdraw_items(one.id for one in page.store.items("shapes"))
    page.store.add_items([dataclasses.replace(item, id="long", caption=caption)])
    for viewport in (WIDE, TELEPHONE):
        with visiting(browser, page.url, viewport=viewport) as visitor:
            visitor.settle()
            assert visitor.prompt == caption
            assert_fits(visitor)
            assert visitor.tab.query_selector(".picture").bounding_box()["width"] > 220
            # what has to be scrolled can be scrolled by keys
            scrolled = visitor.tab.evaluate(
                "(e => e.scrollHeight > e.clientHeight + 1)(document.querySelector('#prompt'))"
            )
            assert visitor.tab.get_attribute("#prompt", "tabindex") == ("0" if scrolled else None)
            assert accessibility_findings(visitor.tab) == []


def test_reload_back_and_double_click_are_harmless(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        before = visitor.pictures
        visitor.tab.reload()
        visitor.settle()
        assert visitor.pictures == before
        visitor.tab.goto(page.url + "/health")
        visitor.tab.go_back()
        visitor.settle()
        assert visitor.pictures == before
        visitor.after(lambda: visitor.tab.dblclick(".picture >> nth=0"))
        assert len(choices_of(page)) == 1
        visitor.after(lambda: visitor.press("ArrowLeft"))
        assert len(choices_of(page)) == 2


def test_the_next_pictures_are_there_before_the_choice(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        visitor.tab.wait_for_load_state("networkidle")
        before = len([asked for asked in visitor.asked if "/picture/" in asked])
        assert before == 4, "two that are shown and two that come"
        loads = len([asked for asked in visitor.asked if asked == page.url + "/"])
        for _ in range(3):
            visitor.after(lambda: visitor.press("ArrowLeft"))
        pictures = [asked for asked in visitor.asked if "/picture/" in asked]
        assert len(set(pictures)) == 10
        assert loads == len([a for a in visitor.asked if a == page.url + "/"]) == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_rule_engine_finds_nothing_serious(browser: Any, serve_page: Make, theme: str) -> None:
    page = serve_page()
    with visiting(browser, page.url, color_scheme=theme) as visitor:
        visitor.settle()
        assert accessibility_findings(visitor.tab) == []
        visitor.tab.evaluate("document.documentElement.removeAttribute('lang')")
        (finding,) = accessibility_findings(visitor.tab)
        assert finding.startswith("serious html-has-lang"), "it finds what is wrong"
        visitor.tab.evaluate("document.documentElement.lang = 'en'")
        visitor.press("?")
        assert accessibility_findings(visitor.tab) == []
        visitor.press("Escape")
        visitor.click("#theme")
        visitor.tab.reload()
        visitor.settle()
        other = {"light": "dark", "dark": "light"}[theme]
        assert visitor.tab.get_attribute("html", "data-theme") == other
        assert accessibility_findings(visitor.tab) == []


def test_a_screen_reader_hears_what_is_asked_and_saved(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        heard = visitor.tab.locator("#live")
        assert heard.inner_text() == f"Next: {visitor.prompt}"
        names = [
            one.get_attribute("aria-label") for one in visitor.tab.query_selector_all(".picture")
        ]
        assert names == ["Left picture: choose it", "Right picture: choose it"]

        # by Tab and Enter alone; the focus stays where it was
        visitor.tab.focus(".picture >> nth=0")
        visitor.press("Tab")
        visitor.after(lambda: visitor.press("Enter"))
        assert choices_of(page) == ["right"]
        assert heard.inner_text() == f"Saved. Next: {visitor.prompt}"
        assert visitor.tab.get_attribute(":focus", "data-place") == "1"


def test_keys_can_be_switched_off(browser: Any, serve_page: Make) -> None:
    page = serve_page()
    with visiting(browser, page.url) as visitor:
        visitor.settle()
        visitor.click("#help")
        visitor.tab.uncheck("#letters")
        visitor.click("dialog button.main")
        visitor.press("s")
        visitor.press("ArrowLeft")
        visitor.after(lambda: visitor.click(visitor.choose("right")))
        assert choices_of(page) == ["right"]


def test_the_page_speaks_japanese(browser: Any, serve_page: Make) -> None:
    with visiting(browser, serve_page().url, locale="ja-JP") as visitor:
        visitor.settle()
        assert visitor.tab.inner_text(".ask-line") == "お題に合うのはどちらですか？"
        visitor.tab.select_option("#language", "en")
        visitor.tab.wait_for_selector("html[lang=en]")
        visitor.settle()
        visitor.tab.reload()
        assert visitor.tab.inner_text(".ask-line") == "Which picture fits this better?"
