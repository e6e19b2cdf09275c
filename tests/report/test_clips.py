"""Clips on a report: every frame is there, all clips show what one clock says, one button stops
them, and paper has stills."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from rlalign.core.pictures import Cell
from rlalign.learning.changes import write_base, write_changes
from rlalign.learning.evaluate import write_samples
from rlalign.report import write_report
from rlalign.report.gallery import film_uri, still_uri
from tests.made_clips import FRAMES, made_clips, scored_clips
from tests.report.test_report import CONFIG, Page, evaluation_record, round_record


def films_of(text: str, width: int = 24) -> list[np.ndarray]:
    """(F, 3, H, W) of each clip that a page plays, in its order."""
    found = []
    for film in [one for one in Page(text).all("img") if "film" in (one.get("class") or "")]:
        row = picture_of(str(film["src"]))
        found.append(np.stack(np.split(row, row.shape[2] // width, axis=2)))
    return found


def picture_of(uri: str) -> np.ndarray:
    """(3, H, W) of a data URI."""
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as opened:
        return np.asarray(opened.convert("RGB")).transpose(2, 0, 1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of two evaluations of six clips."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    lines = "".join(json.dumps(round_record(r)) + "\n" for r in (1, 2))
    (tmp_path / "metrics.jsonl").write_text(lines)
    lines = "".join(json.dumps(evaluation_record(r)) + "\n" for r in (0, 2))
    (tmp_path / "evaluations.jsonl").write_text(lines)
    for number in (0, 2):
        one = scored_clips(made_clips(6, seed=number))
        one.total_B[:3] += 1.0 * number
        write_samples(tmp_path, number, [one], 4)
        if number == 0:
            write_base(tmp_path, [one])
        write_changes(tmp_path, number, [one])
    return tmp_path


def test_before_and_after_have_the_very_frames(run: Path) -> None:
    text = write_report(run).read_text()
    films = films_of(text)
    before, after = made_clips(6, seed=0), made_clips(6, seed=2)
    pairs = [clip for i in range(4) for clip in (before[i], after[i])]
    gains = [clip for i in range(3) for clip in (before[i], after[i])]
    assert len(films) == len(pairs) + len(gains)
    for found, wanted in zip(films, pairs + gains, strict=True):
        assert np.array_equal(found, wanted)
    # nine frames at eight a second, and a word for those who see nothing
    assert "animation-duration: 1.1250s; animation-timing-function: steps(9, jump-none)" in text
    assert f'alt="before: prompt 0 ({FRAMES} frames)"' in text
    # paper shows four of them
    stills = [one for one in Page(text).all("img") if "still" in (one.get("class") or "")]
    assert np.array_equal(
        picture_of(str(stills[0]["src"])), np.concatenate(before[0][[0, 3, 5, 8]], axis=2)
    )
    assert len(re.findall("<script>", text)) == 1
    # it needs nothing from outside
    assert "http" not in text.split("<body>")[1].replace("http://www.w3.org", "")


def test_large_clips_are_shrunk_in_a_page() -> None:
    media = np.full((3, 3, 200, 400), 90, dtype=np.uint8)
    cell = Cell(media_FCHW=media, caption="a", score=None)
    assert picture_of(film_uri(cell)).shape == (3, 80, 3 * 160)
    assert np.abs(picture_of(still_uri(cell)).astype(int) - 90).max() <= 3


@pytest.mark.promise
def test_all_clips_of_a_page_run_on_one_clock(run: Path, browser: Any) -> None:
    page = write_report(run).resolve().as_uri()
    tab = browser.new_page()
    tab.goto(page)
    films = "document.getAnimations().filter((one) => one.animationName === 'film')"
    started = f"[...new Set({films}.map((one) => one.startTime))]"
    assert tab.evaluate(f"{films}.length") == 14
    assert tab.evaluate(f"{films}.every((one) => one.playState === 'running')")
    assert len(tab.evaluate(started)) == 1
    # the button stops all at one moment, and lets all go on from there
    assert tab.inner_text(".player") == "Pause clips"
    tab.click(".player")
    times = tab.evaluate(f"[...new Set({films}.map((one) => one.currentTime))]")
    assert len(times) == 1
    assert tab.evaluate(f"{films}.every((one) => one.playState === 'paused')")
    tab.click(".player")
    assert len(tab.evaluate(started)) == 1
    # each frame of a film, as it is seen
    tab.click(".player")
    wanted = made_clips(6, seed=0)[0].astype(int)
    box = tab.locator(".film").first
    box.evaluate("(film) => film.classList.add('first')")
    place = "position: fixed; left: 0; top: 0; z-index: 9; width: 240px; border-radius: 0"
    tab.add_style_tag(content=f".first {{ {place} }}")
    for number in range(FRAMES):
        moment = 1000 / 8 * (number + 0.5)
        tab.evaluate(f"{films}.forEach((one) => {{ one.currentTime = {moment}; }})")
        with Image.open(io.BytesIO(box.screenshot())) as shot:
            seen = np.asarray(shot.convert("RGB")).transpose(2, 0, 1)[:, 5::10, 5::10]
        assert np.abs(seen.astype(int) - wanted[number]).max() <= 1, number
    tab.emulate_media(media="print")
    assert not tab.locator(".film").first.is_visible()
    assert tab.locator(".still").first.is_visible()
    assert not tab.locator(".player").is_visible()
    tab.close()


@pytest.mark.promise
def test_who_wants_less_motion_starts_clips_themselves(run: Path, browser: Any) -> None:
    tab = browser.new_page(reduced_motion="reduce")
    tab.goto(write_report(run).resolve().as_uri())
    states = "[...new Set(document.getAnimations().map((one) => one.playState))]"
    assert tab.evaluate(states) == ["paused"]
    assert tab.inner_text(".player") == "Play clips"
    tab.click(".player")
    assert tab.evaluate(states) == ["running"]
    tab.close()
