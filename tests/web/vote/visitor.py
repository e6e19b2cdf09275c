"""A person at a browser: what is shown, and what is done by mouse, keys and touch. Whatever a page
asks of another host, or writes into the console, is kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPEN = "#board[data-open=true]"
WIDE = {"width": 1366, "height": 768}
TELEPHONE = {"width": 390, "height": 844}


class Visitor:
    """One tab of a browser's context."""

    def __init__(self, context: Any, url: str) -> None:
        self.context = context
        self.url = url
        self.tab = context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.expected = ""
        """What the console may say of a connection that a test has cut."""
        self.tab.on("console", lambda line: self.complaints.append(f"{line.type}: {line.text}"))
        self.tab.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(url)

    def settle(self) -> None:
        """Until a ballot can be answered."""
        self.tab.wait_for_selector(OPEN)

    def after(self, deed: Any) -> None:
        """Until the ballot after a choice can be answered; the deed is the choice."""
        with self.tab.expect_response("**/vote"):
            deed()
        self.settle()

    def wait_for(self, title: str) -> None:
        """Until the page says why there is no ballot."""
        self.tab.wait_for_selector(f"#wait-title:text-is('{title}')")

    @property
    def pictures(self) -> list[str]:
        """Where the pictures come from, as they are shown."""
        images = self.tab.query_selector_all(".picture img")
        return [image.get_attribute("src") for image in images]

    @property
    def prompt(self) -> str:
        return self.tab.inner_text("#prompt")

    def press(self, key: str) -> None:
        self.tab.keyboard.press(key)

    def click(self, what: str, **how: Any) -> None:
        self.tab.click(what, **how)

    def tap(self, what: str) -> None:
        self.tab.tap(what)

    def choose(self, choice: str) -> str:
        """The selector of a choice's button."""
        return f'button[data-choice="{choice}"]'

    def see(self, page: str) -> None:
        """Goes to a page of the same server."""
        self.tab.goto(self.url + page)


@contextlib.contextmanager
def visiting(browser: Any, url: str, **how: Any) -> Iterator[Visitor]:
    """A visitor with cookies of their own; at the end nothing was asked elsewhere, and the console
    is empty."""
    context = browser.new_context(**{"viewport": WIDE, **how})
    context.set_default_timeout(0)  # what hangs is pytest's timeout's
    try:
        visitor = Visitor(context, url)
        yield visitor
        said = [one for one in visitor.complaints if not _is_expected(one, visitor.expected)]
        assert said == [], said
        elsewhere = [asked for asked in visitor.asked if not asked.startswith(visitor.url)]
        assert elsewhere == [], elsewhere
    finally:
        context.close()


def _is_expected(complaint: str, expected: str) -> bool:
    return bool(expected) and expected in complaint


@functools.cache
def _axe() -> str:
    import axe_playwright_python

    (file,) = Path(axe_playwright_python.__file__).parent.glob("axe.min.js")
    return file.read_text(encoding="utf-8")


def accessibility_findings(tab: Any) -> list[str]:
    """What axe-core finds on a page, "impact rule: elements" each.

    It is run through the debugger, which the page's own policy does not bind.
    """
    session = tab.context.new_cdp_session(tab)
    session.send("Runtime.evaluate", {"expression": _axe()})
    answer = session.send(
        "Runtime.evaluate",
        {
            "expression": "axe.run(document).then(r => r.violations.map(v => v.impact + ' ' + v.id"
            " + ': ' + v.nodes.map(n => n.target + ' ' + n.failureSummary).join(' | ')))",
            "awaitPromise": True,
            "returnByValue": True,
        },
    )
    session.detach()
    return answer["result"]["value"]
