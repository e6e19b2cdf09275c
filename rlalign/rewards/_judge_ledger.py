"""What a judge has answered, and what it has cost: a SQLite file, or memory."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator

from rlalign.core.registry import UserError, read_reason

_WAIT_SECONDS = 60.0
"""For another process that writes."""

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (one INTEGER PRIMARY KEY CHECK (one = 1),
    requests INTEGER NOT NULL, tokens INTEGER NOT NULL);
INSERT OR IGNORE INTO spent VALUES (1, 0, 0);
"""


class BudgetSpent(Exception):
    """There is no request left to make: which limit, as the rest of a sentence."""


class Ledger:
    """Replies by the hash of what was asked, and the requests and tokens that they took.

    Several threads and processes may share a file: a request is counted in it before it is made.
    """

    def __init__(self, file: str, requests: int, tokens: int, place: str) -> None:
        """``file`` "" keeps all in memory; limits of 0 are none. Raises UserError at ``place`` for
        a file that cannot be used."""
        self._limits = {"requests": requests, "tokens": tokens}
        self._place = f"{place}.cache"
        self._alone = threading.Lock()
        with self._safe():
            self._base = sqlite3.connect(
                file or ":memory:",
                timeout=_WAIT_SECONDS,
                check_same_thread=False,
                isolation_level=None,
            )
            self._base.executescript(_TABLES)

    def find(self, question: str) -> str | None:
        """The reply that is kept for a hash, or None."""
        with self._safe():
            row = self._base.execute(
                "SELECT reply FROM answers WHERE question = ?", (question,)
            ).fetchone()
        return None if row is None else row[0]

    def keep(self, question: str, reply: str) -> None:
        """Keeps a reply."""
        with self._safe():
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (question, reply))

    def take_request(self) -> None:
        """Counts a request that is about to be made. Raises BudgetSpent where a limit is met."""
        with self._safe():
            self._base.execute("BEGIN IMMEDIATE")
            try:
                spent = dict(zip(self._limits, self._row(), strict=True))
                for what, limit in self._limits.items():
                    if limit and spent[what] >= limit:
                        raise BudgetSpent(f"has taken {spent[what]:,} {what} (budget_{what})")
                self._base.execute("UPDATE spent SET requests = requests + 1")
            finally:
                self._base.execute("COMMIT")

    def add_tokens(self, tokens: int) -> None:
        """Counts the tokens of an answer."""
        with self._safe():
            self._base.execute("UPDATE spent SET tokens = tokens + ?", (tokens,))

    def spent(self) -> tuple[int, int]:
        """(requests, tokens) so far."""
        with self._safe():
            return self._row()

    def _row(self) -> tuple[int, int]:
        return self._base.execute("SELECT requests, tokens FROM spent").fetchone()

    @contextlib.contextmanager
    def _safe(self) -> Iterator[None]:
        try:
            with self._alone:
                yield
        except sqlite3.Error as error:
            raise UserError(
                f"{self._place} cannot be used ({read_reason(error)}); name another file, or none"
            ) from error
