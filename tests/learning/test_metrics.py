"""What a run writes per round: lines that survive a kill, and the terminal."""

from __future__ import annotations

import io
import json
import math
import re
import time

import pytest

from rlalign.learning.metrics import Console, Recorder, evaluation_line, read_lines, round_line

AT_WORK = re.compile(r" *\d+ s  ")
"""How a line begins that says what is at work, on a machine that is slow."""


def record(round: int, **more: float) -> dict[str, float]:
    """A round's line with the keys that a person sees."""
    line = {
        "round": round,
        "reward/total/mean": 0.25 * round,
        "reward/total/std": 0.1,
        "grad_norm": 1.5,
    }
    line |= {f"seconds/{p}": 0.5 for p in ("rollout", "reward", "update", "sync")} | {
        "seconds/round": 2.0
    }
    return line | more


def evaluation(round: int) -> dict[str, float]:
    return {
        "round": round,
        "reward/total/mean": 0.5,
        "reward/shapes/mean": 0.625,
        "diversity/pixel_rms": 0.125,
    }


def test_lines_append_in_order(tmp_path):
    recorder = Recorder(tmp_path / "new" / "run", -1)
    for r in (1, 2):
        recorder.write(record(r))
    recorder.write_evaluation(evaluation(2))
    assert read_lines(tmp_path / "new" / "run" / "metrics.jsonl") == [record(1), record(2)]
    assert read_lines(tmp_path / "new" / "run" / "evaluations.jsonl") == [evaluation(2)]


def test_a_line_is_readable_before_the_recorder_is_closed(tmp_path):
    recorder = Recorder(tmp_path, -1)
    recorder.write(record(1))
    assert read_lines(tmp_path / "metrics.jsonl") == [record(1)]


@pytest.mark.parametrize(("resume_at", "kept"), [(-1, []), (0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_resume_drops_what_will_be_written_again(tmp_path, resume_at, kept):
    lines = [json.dumps(record(r)) for r in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"round": 4, "reward/to')
    (tmp_path / "evaluations.jsonl").write_text(
        json.dumps(evaluation(0)) + "\n" + json.dumps(evaluation(3)) + "\n"
    )
    recorder = Recorder(tmp_path, resume_at)
    assert [r["round"] for r in read_lines(tmp_path / "metrics.jsonl")] == kept
    assert [r["round"] for r in read_lines(tmp_path / "evaluations.jsonl")] == [
        r for r in (0, 3) if r <= resume_at
    ]
    recorder.write(record(7))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["round"] for line in text.splitlines()] == [
        *kept,
        7,
    ]  # every line is whole
    assert not list(tmp_path.glob(".*"))


def test_a_half_written_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(record(1)) + '\n{"round": 2, "x": 0.')
    assert read_lines(path) == [record(1)]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_nan_and_infinity_become_null(tmp_path):
    recorder = Recorder(tmp_path, -1)
    recorder.write(record(1, bad=math.nan, worse=-math.inf))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert strict["bad"] is None and strict["worse"] is None


def test_round_line_says_what_matters():
    line = round_line(
        record(3, **{"ratio/clip_fraction": 0.125, "restarts/rollout": 2, "seconds/sync": 0.01}), 30
    )
    assert line.startswith("round   3/30  reward +0.7500 ± 0.100")
    assert "clipped 12.5 %" in line and "grad 1.5" in line and "2 rollout restarts" in line
    assert (
        "2.0 s (rollout 0.5, reward 0.5, update 0.5)" in line
    )  # a phase without time is not worth its place
    plain = round_line(record(3, **{"restarts/reward": 1}), 30)
    assert "clipped" not in plain and plain.endswith("1 reward restart")


def test_what_is_at_work_is_said_where_nothing_else_is(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Console, "PAUSE_SECONDS", 0.01)
    stream = io.StringIO()
    console = Console(stream)
    console.begin(30)
    said = {
        "starting": {"note": "a note"},
        "starting  0 of 3 workers are ready": workers(0),
        "round   4/30  2 of 8 units, 9 s left": units(4, 2),
        "evaluation  8 of 8 units, 0 s left": units(0, 8),
        "next round": record(3),
        "last evaluation and report": record(30),
    }
    for work, line in said.items():
        console.record(line)
        while not any(AT_WORK.sub("", s) == work for s in stream.getvalue().splitlines()):
            time.sleep(0.01)
    console.end()
    before = stream.getvalue()
    time.sleep(0.1)
    assert stream.getvalue() == before, "the last word is said"


def test_a_bar_shows_what_is_at_work(monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    console = Console(stream)
    console.begin(30)
    console.record(units(4, 2))
    console.end()  # draws the bar a last time
    assert "round   4/30  2 of 8 units, 9 s left" in stream.getvalue()


def workers(ready: int) -> dict[str, dict[str, object]]:
    """A run that has not begun."""
    return {"progress": {"round": None, "what": "workers are ready", "done": ready, "of": 3}}


def units(round: int, done: int) -> dict[str, dict[str, object]]:
    """Three seconds in, so many of eight units are there."""
    return {"progress": {"round": round, "what": "units", "done": done, "of": 8, "seconds": 3.0}}


def test_evaluation_line_names_rewards_and_diversity():
    line = evaluation_line(evaluation(10) | {"held_out/clip/mean": 0.3})
    assert line == "evaluation after round 10: shapes 0.6250, clip 0.3000, diversity 0.125"


def test_console_is_plain_off_a_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    stream = io.StringIO()
    console = Console(stream)
    console.begin(30, done=2)
    console.record(record(3))
    console.record({"evaluation": evaluation(3)})
    console.record({"note": "a note with [brackets] and a path /tmp/x"})
    console.end("done [in 3 s]")
    lines = [line for line in stream.getvalue().splitlines() if not AT_WORK.match(line)]
    assert lines == [
        round_line(record(3), 30),
        evaluation_line(evaluation(3)),
        "a note with [brackets] and a path /tmp/x",
        "done [in 3 s]",
    ]
    assert "\x1b" not in stream.getvalue()
