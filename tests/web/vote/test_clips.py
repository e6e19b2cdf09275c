"""Clips on the page: both show one moment of one clock, and stop, step and slow down together."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlalign.ballots.records import Campaign, Item, Picture, picture_uid
from rlalign.ballots.store import Store
from rlalign.core.clips import encode_clip, lay_out, read_clip
from tests.made_clips import FRAMES, made_clips
from tests.web.vote.made_desk import Served, desk_of, served
from tests.web.vote.visitor import accessibility_findings, visiting

Shown = tuple[Served, dict[str, np.ndarray]]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Shown]:
    """A page with one question of two clips, one of which stands still in its middle; and the
    clips by their names."""
    clips = {}
    with contextlib.closing(Store.open(tmp_path / "clips.sqlite")) as store:
        store.create_campaign(Campaign(id="shapes", mode="pairs"))
        for media in made_clips(3)[[0, 2]]:
            content, kind = encode_clip(media)
            uid = picture_uid(content)
            made = Picture(uid=uid, caption="a ball", frames=FRAMES, media_type=kind)
            store.add_picture(made, content)
            clips[uid] = media
        store.add_items([Item(id="i", campaign="shapes", caption="a ball", uids=tuple(clips))])
        with served(desk_of(store, "pairs", {}), tmp_path) as found:
            yield found, clips


def test_a_sheet_has_every_frame_row_by_row() -> None:
    media = made_clips(1)[0]
    sheet, columns = lay_out(media, 100)
    assert (columns, sheet.shape) == (4, (3, 3 * 16, 4 * 24))
    for number, frame in enumerate(media):
        y, x = number // 4 * 16, number % 4 * 24
        assert np.array_equal(sheet[:, y : y + 16, x : x + 24], frame)
    assert not sheet[:, 32:, 24:].any()
    assert lay_out(media, 1)[1] == 1
    assert np.array_equal(lay_out(media, 10**6)[0], np.concatenate(media, axis=2))


@pytest.mark.promise
def test_two_clips_play_on_one_clock(page: Shown, browser: Any) -> None:
    found, clips = page
    with visiting(browser, found.url) as visitor:
        visitor.settle()
        tab = visitor.tab
        frames = "[...document.querySelectorAll('.film img')].map((one) => one.dataset.frame)"
        assert all("/film/" in source for source in visitor.pictures)
        assert tab.is_visible("#player")
        assert tab.inner_text(".ask-line") == "Which clip fits this better?"
        labels = [box.get_attribute("aria-label") for box in tab.query_selector_all(".picture")]
        assert labels == ["Left clip: choose it", "Right clip: choose it"]
        tab.wait_for_selector(".film img:not([data-frame='0'])")  # they play by themselves

        # stopped, both stand at one moment, and each step is a frame of both
        visitor.press(",")
        assert tab.inner_text("#play-word") == "Play"
        for _ in range(FRAMES + 1):
            before = tab.evaluate(frames)
            assert before[0] == before[1]
            visitor.press(".")
            assert tab.evaluate(frames) == [str((int(before[0]) + 1) % FRAMES)] * 2
        while tab.evaluate(frames)[0] != "0":
            visitor.press(".")

        # what is seen is the very frame
        for number in range(FRAMES):
            seen = [seen_in(box) for box in tab.query_selector_all(".picture")]
            mine = [media[number] for media in clips.values()]
            assert any(
                all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(seen, both, strict=True))
                for both in (mine, mine[::-1])
            ), number
            visitor.press(".")

        # half speed, and on
        visitor.press("-")
        assert tab.get_attribute('[data-do="slow"]', "aria-pressed") == "true"
        visitor.click('[data-do="play"]')
        assert tab.inner_text("#play-word") == "Pause"
        stopped = tab.evaluate(frames)
        tab.wait_for_selector(f".film img:not([data-frame='{stopped[0]}'])")
        assert accessibility_findings(tab) == []
        with tab.expect_response("**/vote"):
            visitor.press("ArrowLeft")


def seen_in(box: Any) -> np.ndarray:
    """(3, 16, 24) of what a box shows, the middle of each of its pixels."""
    with Image.open(io.BytesIO(box.screenshot())) as shot:
        pixels = np.asarray(shot.convert("RGB"))
    height, width = pixels.shape[:2]
    rows = ((np.arange(16) + 0.5) * height / 16).astype(int)
    columns = ((np.arange(24) + 0.5) * width / 24).astype(int)
    return pixels[rows][:, columns].transpose(2, 0, 1)


@pytest.mark.promise
def test_who_wants_less_motion_starts_them(page: Shown, browser: Any) -> None:
    with visiting(browser, page[0].url, reduced_motion="reduce") as visitor:
        visitor.settle()
        assert visitor.tab.inner_text("#play-word") == "Play"
        assert visitor.tab.get_attribute(".film img", "data-frame") == "0"


@pytest.mark.promise
def test_the_page_gives_the_very_frames(page: Shown, browser: Any) -> None:
    found, clips = page
    with visiting(browser, found.url) as visitor:
        visitor.settle()
        for source in visitor.pictures:
            answer = visitor.context.request.get(found.url + source)
            facts = [answer.headers[f"x-{name}"] for name in ("frames", "columns", "rate")]
            assert facts == [str(FRAMES), str(FRAMES), "8"]
            frames = np.split(read_clip(answer.body())[0], FRAMES, axis=2)
            whole = visitor.context.request.get(found.url + source.replace("film", "picture"))
            assert np.array_equal(read_clip(whole.body()), np.stack(frames))
            assert any(np.array_equal(np.stack(frames), media) for media in clips.values())
