"""Sinks that fail, hang or speak of secrets: the run goes on, and says so once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from rlalign.learning.log import MOST_FAILURES, Log, hide_secrets
from rlalign.sinks.base import Origin, Sink


class Book:
    """A writer that keeps what it is told; raises on the calls whose numbers are in ``bad``."""

    def __init__(self, bad=()):
        self.lines = []
        self.calls = 0
        self.bad = bad

    def _call(self, *line):
        self.calls += 1
        if self.calls in self.bad:
            raise ConnectionError("the server is down")
        self.lines.append(line)

    def write(self, round, values):
        self._call("write", round, dict(values))

    def show(self, round, picture):
        self._call("show", round, picture.name)

    def keep(self, file):
        self._call("keep", file.name)

    def close(self, ended):
        self._call("close", ended)


class Given(Sink):
    """A sink that opens a writer of the test's, or raises. Source: a test's own."""

    writers: list = []  # noqa: RUF012 - a field of pydantic's

    def connect(self, origin):
        found = self.writers.pop(0) if len(self.writers) > 1 else self.writers[0]
        if isinstance(found, BaseException):
            raise found
        return found


def log_to(*sinks: list, patience: float = 60.0) -> Log:
    origin = Origin(folder=Path(), name="trial", settings={}, resume_at=-1)
    given = [Given.model_construct(name=f"s{i}", writers=w) for i, w in enumerate(sinks)]
    return Log(given, origin, patience=patience)


def test_every_sink_gets_everything_in_order(tmp_path):
    one, other = Book(), Book()
    log = log_to([one], [other])
    (tmp_path / "report.html").touch()
    log.write({"round": 1, "a": 2, "bad": float("nan"), "word": "x", "none": None})
    log.show(1, tmp_path / "round-00001.png")
    log.keep(tmp_path / "report.html")
    log.keep(tmp_path / "missing.html")
    log.close(ended=True)
    assert (
        one.lines
        == other.lines
        == [
            ("write", 1, {"a": 2.0}),
            ("show", 1, "round-00001.png"),
            ("keep", "report.html"),
            ("close", True),
        ]
    )
    assert log.take_notes() == []


def test_one_failure_loses_one_line_and_is_told_once():
    flaky, sound = Book(bad=(2, 4)), Book()
    log = log_to([flaky], [sound])
    for r in range(1, 6):
        log.write({"round": r})
    log.close(ended=True)
    assert [line[1] for line in flaky.lines] == [1, 3, 5, True]
    assert [line[1] for line in sound.lines] == [1, 2, 3, 4, 5, True]
    assert log.take_notes() == [
        "log: s0 failed (ConnectionError: the server is down); the run goes on, and metrics.jsonl"
        " has every number"
    ]
    assert log.take_notes() == []


def test_a_sink_that_keeps_failing_is_left_out():
    dead = Book(bad=range(1, 100))
    log = log_to([dead])
    for r in range(1, 9):
        log.write({"round": r})
    log.close(ended=True)
    assert dead.calls == MOST_FAILURES
    _, left_out = log.take_notes()
    assert left_out == "log: s0 failed 3 times in a row and is left out"


def test_a_sink_that_cannot_be_opened_at_first_is_tried_again():
    book = Book()
    log = log_to([ConnectionError("down"), book])
    for r in (1, 2):
        log.write({"round": r})
    log.close(ended=False)
    assert book.lines == [("write", 1, {}), ("write", 2, {}), ("close", False)]
    assert len(log.take_notes()) == 1


def test_a_sink_that_hangs_holds_up_nothing_but_the_end():
    freed = threading.Event()

    class Stuck(Book):
        def write(self, round, values):
            freed.wait()

    log = log_to([Stuck()], patience=0.05)
    for r in range(1000):
        log.write({"round": r})
    log.close(ended=True)
    (note,) = log.take_notes()
    assert note.startswith("log: s0 does not come to an end")
    freed.set()


def test_no_secret_is_told(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "key-of-the-user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush-hush")
    said = ConnectionError("refused key-of-the-user at https://me:other@host/api with hush-hush")
    log = log_to([said])
    log.close(ended=True)
    (note,) = log.take_notes()
    assert "refused *** at https://me:***@host/api with ***" in note
    assert hide_secrets("http://host:5000/a@b") == "http://host:5000/a@b"


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_without_sinks_has_nothing_to_wait_for(ended):
    log = log_to()
    log.write({"round": 1})
    log.close(ended=ended)
    assert log.take_notes() == []
