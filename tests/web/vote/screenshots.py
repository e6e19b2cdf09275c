"""Takes pictures of the page in every mode, wide and narrow, light and dark, for docs/people.md:

    python -m tests.web.vote.screenshots docs/images/people

Made-up pictures of coloured shapes stand in for a model's. Every file is a WebP of some 20 kB.
Japanese needs a font that has it (Debian: fonts-noto-cjk).
"""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from rlalign.ballots.store import Store
from tests.conftest import FLAGS
from tests.web.vote.made_desk import fill, served
from tests.web.vote.person import Person
from tests.web.vote.visitor import TELEPHONE, Visitor

MOST_BYTES = 16_500
SIZES = {"wide": {"width": 1280, "height": 800}, "narrow": TELEPHONE}
SIDEWAYS = {"width": 844, "height": 390}
TOUCH = {"has_touch": True, "is_mobile": True}
MODES = ("pairs", "chain", "rank", "ab")
CONSENT = (
    "What you choose is stored with the name that you give and the time that you take, and trains"
    " a model that draws pictures. Nothing else about you is kept.\n\nYou may stop at any time, and"
    " have your choices deleted by writing to whoever sent you the link."
)


def take(visitor: Visitor, folder: Path, name: str) -> None:
    """Writes what the browser shows as a WebP, at the best quality that is small enough."""
    with Image.open(io.BytesIO(visitor.tab.screenshot())) as shot:
        for quality in (85, 70, 55, 40, 25):
            file = io.BytesIO()
            shot.convert("RGB").save(file, "webp", quality=quality, method=6)
            if file.tell() < MOST_BYTES:
                break
    (folder / f"{name}.webp").write_bytes(file.getvalue())


def prepare(visitor: Visitor, mode: str) -> None:
    """Brings a page to where its mode can be seen."""
    if mode == "chain":
        visitor.tab.wait_for_selector("body[data-state=waiting]")
        visitor.click("#ask-next")
    visitor.settle()
    if mode == "ab":
        visitor.after(lambda: visitor.press("ArrowLeft"))
    elif mode == "rank":
        visitor.press("2")
        visitor.press("4")
    elif mode == "pairs":
        visitor.press("l")


def shoot_mode(browser: Any, folder: Path, mode: str, place: Path) -> None:
    """Every size and theme of a mode."""
    store = Store.open(place / f"{mode}.sqlite")
    filling = {"items": 8, "count": 5 if mode == "rank" else 2, "side": 512}
    with served(fill(store, mode, **filling), place) as page:
        for size, viewport in SIZES.items():
            for theme in ("light", "dark"):
                how = TOUCH if size == "narrow" else {}
                context = browser.new_context(viewport=viewport, color_scheme=theme, **how)
                visitor = Visitor(context, page.url)
                prepare(visitor, mode)
                take(visitor, folder, f"{mode}-{size}-{theme}")
                context.close()
        if mode == "pairs":
            shoot_tools(browser, folder, page.url)
    store.close()


def shoot_tools(browser: Any, folder: Path, url: str) -> None:
    """Zoom, help, and a telephone on its side."""
    context = browser.new_context(viewport=SIZES["wide"], color_scheme="light")
    visitor = Visitor(context, url)
    visitor.settle()
    visitor.press("z")
    visitor.press("Shift+ArrowRight")
    take(visitor, folder, "zoom-wide-light")
    visitor.press("Escape")
    visitor.press("?")
    take(visitor, folder, "help-wide-light")
    context.close()
    context = browser.new_context(viewport=SIDEWAYS, color_scheme="dark", **TOUCH)
    visitor = Visitor(context, url)
    visitor.settle()
    take(visitor, folder, "pairs-side-dark")
    context.close()


def shoot_rest(browser: Any, folder: Path, place: Path) -> None:
    """Joining, the end, another language, and the results."""
    store = Store.open(place / "rest.sqlite")
    desk = fill(store, "ab", items=8, side=512)
    with served(desk, place) as page:
        for number, choices in enumerate((["left", "right", "tie"] * 3, ["right", "skip"] * 4)):
            person = Person(page.url, name=("Ada", "Grace")[number])
            for choice in choices[:8]:
                person.vote(person.ballot()["ballot"], choice, decide_ms=1800 + 700 * number)
        for theme in ("light", "dark"):
            context = browser.new_context(viewport=SIZES["wide"], color_scheme=theme)
            visitor = Visitor(context, page.url + "/results")
            take(visitor, folder, f"results-wide-{theme}")
            context.close()
        consent = {"consent": CONSENT, "consent_version": "1"}
        desk.about = dataclasses.replace(desk.about, **consent)
        for language in ("en", "ja"):
            context = browser.new_context(viewport=TELEPHONE, locale=language, **TOUCH)
            visitor = Visitor(context, page.url)
            visitor.tab.wait_for_selector("#join:visible")
            take(visitor, folder, f"join-narrow-{language}")
            if language == "ja":
                visitor.tab.check("#join-consent")
                visitor.click("#join button.main")
                visitor.settle()
                take(visitor, folder, "ballot-narrow-ja")
            context.close()
    store.close()


def main(folder: Path) -> None:
    """Takes all of them."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as place:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for mode in MODES:
            shoot_mode(browser, folder, mode, Path(place))
        shoot_rest(browser, folder, Path(place))
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
