"""One metrics record per round, and where it goes: JSON lines, the sinks of a run, the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlalign.core.files import dump_json, write_whole
from rlalign.learning.log import Log


class Recorder:
    """The lines of a run: ``metrics.jsonl`` and ``evaluations.jsonl``, and the same for the sinks
    of its ``log``.

    ``resume_at`` is the round of the checkpoint that the run goes on from (-1: none): later lines,
    and a half-written one, are dropped, since they will be written again.
    """

    def __init__(self, folder: Path, resume_at: int, log: Log | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = folder / "metrics.jsonl"
        self._evaluations = folder / "evaluations.jsonl"
        for path in (self._metrics, self._evaluations):
            _keep_until(path, resume_at)
        self._log = log

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a round's record and makes it durable."""
        _append(self._metrics, record)
        if self._log is not None:
            self._log.write(record)

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Appends an evaluation's record."""
        _append(self._evaluations, record)
        named = {f"evaluation/{k}": v for k, v in record.items() if k != "round"}
        if self._log is not None:
            self._log.write({"round": record["round"], **named})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a missing file has none, a half-written last line is left
    out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _keep_until(path: Path, round: int) -> None:
    kept = [r for r in read_lines(path) if r["round"] <= round]
    write_whole(path, "".join(json.dumps(r) + "\n" for r in kept))


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """One line, NaN and infinities as null, on the disk when this returns."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(dump_json(record) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def round_line(record: Mapping[str, Any], rounds: int) -> str:
    """A round in one readable line."""
    parts = [f"round {record['round']:>3}/{rounds}"]

    # what was learned
    if "reward/total/mean" in record:
        parts.append(
            f"reward {record['reward/total/mean']:+.4f} ± {record['reward/total/std']:.3f}"
        )
    if "preference/accuracy" in record:
        parts.append(f"agrees {100 * record['preference/accuracy']:4.1f} %")
    if "ratio/clip_fraction" in record:
        parts.append(f"clipped {100 * record['ratio/clip_fraction']:4.1f} %")
    parts.append(f"grad {record['grad_norm']:.3g}")

    # how long it took
    seconds = {p: record[f"seconds/{p}"] for p in ("rollout", "reward", "update", "sync")}
    parts.append(
        f"{record['seconds/round']:5.1f} s ("
        + ", ".join(f"{p} {s:.1f}" for p, s in seconds.items() if s >= 0.05)
        + ")"
    )

    # what was lost on the way
    restarts = {p: record.get(f"restarts/{p}", 0) for p in ("rollout", "reward")}
    parts += [f"{n} {p} restart{'s' if n > 1 else ''}" for p, n in restarts.items() if n]
    return "  ".join(parts)


def evaluation_line(record: Mapping[str, Any]) -> str:
    """An evaluation in one readable line."""
    scores = [
        f"{k.split('/')[1]} {v:.4f}"
        for k, v in record.items()
        if k.endswith("/mean") and not k.startswith("reward/total")
    ]
    return (
        f"evaluation after round {record['round']}: "
        + ", ".join(scores)
        + f", diversity {record['diversity/pixel_rms']:.3f}"
    )


def progress_line(record: Mapping[str, Any], rounds: int) -> str:
    """How far the work at hand is, in one readable line."""
    done, of = record["done"], record["of"]
    counted = f"{done} of {of} {record['what']}"
    if record["round"] is None:  # how long processes take to start is not foreseen
        return f"starting  {counted}"
    left = record["seconds"] / done * (of - done)
    where = f"round {record['round']:>3}/{rounds}" if record["round"] else "evaluation"
    return f"{where}  {counted}, {left:.0f} s left"


class Console:
    """What a person sees of a run: a line per round, and what is at work now: in a progress bar on
    a terminal; elsewhere in a plain line where nothing was said for three seconds, or for half a
    hundredth of the time since the run began, so that the log of a long run stays short."""

    PAUSE_SECONDS = 2.5

    def __init__(self, stream: Any = None) -> None:
        self._rich = Rich(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._rounds = 0
        self._work = "starting"
        self._began = self._said = time.monotonic()
        self._over = threading.Event()
        self._watch: threading.Thread | None = None

    def begin(self, rounds: int, done: int = 0) -> None:
        """A run of so many rounds starts, or goes on."""
        self._rounds = rounds

        # a terminal shows a bar, a file gets a line now and then
        if self._rich.is_terminal:
            columns = (
                TextColumn("[bold]rounds"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
            )
            self._progress = Progress(*columns, console=self._rich, transient=True)
            self._task = self._progress.add_task(self._work, total=rounds, completed=done)
            self._progress.start()
        else:
            self._watch = threading.Thread(target=self._say_now_and_then, daemon=True)
            self._watch.start()

    def _say_now_and_then(self) -> None:
        """Where there is no bar: what is at work, when nothing else was said for a while."""
        while not self._over.wait(self.PAUSE_SECONDS / 5):
            now = time.monotonic()
            if now - self._said >= max(self.PAUSE_SECONDS, (now - self._began) / 200):
                with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                    self.note(f"{now - self._began:5.0f} s  {self._work}")

    def _show(self, work: str) -> None:
        self._work = work
        if self._progress is not None:
            self._progress.update(self._task, description=work)

    def round(self, record: Mapping[str, Any]) -> None:
        """A round is over."""
        self._rich.print(round_line(record, self._rounds))
        self._said = time.monotonic()
        self._show("next round" if record["round"] < self._rounds else "last evaluation and report")
        if self._progress is not None:
            self._progress.update(self._task, completed=record["round"])

    def record(self, record: Mapping[str, Any]) -> None:
        """Whatever a run reports: progress in a round, a round, an evaluation, or a note."""
        if "progress" in record:
            self._show(progress_line(record["progress"], self._rounds))
        elif "evaluation" in record:
            self.note(evaluation_line(record["evaluation"]))
        elif "note" in record:
            self.note(record["note"])
        else:
            self.round(record)

    def note(self, text: str) -> None:
        """One line of text."""
        self._rich.print(text, markup=False)
        self._said = time.monotonic()

    def end(self, summary: str = "") -> None:
        """The run is over."""
        self._over.set()
        if self._watch is not None:
            self._watch.join()
            self._watch = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if summary:
            self._rich.print(summary, markup=False)
