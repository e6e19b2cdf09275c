"""What a person sees of a run while it goes on: its lines, its pictures, the report, and what its
sinks are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlalign.config import Run, resolved
from rlalign.core.records import Scored
from rlalign.core.registry import UserError, read_reason
from rlalign.learning import changes, checkpoint, evaluate
from rlalign.learning.log import Log, hide_secrets_in
from rlalign.learning.metrics import Recorder
from rlalign.sinks.base import Origin

OnRecord = Callable[[dict[str, Any]], None]


class Display:
    """Of the one process that writes the run folder. A full disk ends a run; a page or a sink that
    fails does not."""

    def __init__(self, run: Run, folder: Path, on_record: OnRecord, resume_at: int) -> None:
        self._run = run
        self._folder = folder
        self._on_record = on_record
        # a store of votes may have a password in its address, which is no sink's business
        settings = resolved(run)
        shown = hide_secrets_in(settings)
        origin = Origin(folder=folder, name=shown["name"], settings=shown, resume_at=resume_at)
        self._log = Log(run.log, origin)
        if shown == settings:
            self._log.keep(folder / "config.yaml")
        self._recorder = Recorder(folder, resume_at, self._log)
        self._is_closed = False

    def write_round(self, line: dict[str, Any]) -> None:
        """A round's line of metrics."""
        with checkpoint.disk_errors(self._folder):
            self._recorder.write(line)
        self._on_record(line)
        self._tell()

    def show(self, round: int, scored: Sequence[Scored]) -> None:
        """The pictures of an evaluation, as soon as they are there."""
        with checkpoint.disk_errors(self._folder):
            grid = evaluate.write_samples(self._folder, round, scored, self._run.evaluate.grid)
            if round == 0:
                changes.write_base(self._folder, scored)
            changed = changes.write_changes(self._folder, round, scored)
        self._log.show(round, grid)
        if changed is not None:
            self._log.show(round, changed)

    def write_evaluation(self, line: dict[str, Any]) -> None:
        """An evaluation's line, and the report as far as the run has come."""
        with checkpoint.disk_errors(self._folder):
            self._recorder.write_evaluation(line)
        self._on_record({"evaluation": line})
        try:
            self._write_report()
        except (OSError, UserError):
            raise
        except Exception as error:  # a page is no reason to lose a run; the last one is tried again
            reason = f"{type(error).__name__}: {read_reason(error)}"
            self._on_record({"note": f"the report is not renewed ({reason}); the run goes on"})
        self._tell()

    def finish(self, result: Mapping[str, Any]) -> None:
        """The comparison that ends the run, and the report."""
        with checkpoint.disk_errors(self._folder):
            evaluate.write_json(self._folder / "evaluation.json", result)
        self._write_report()
        self.close(ended=True)

    def close(self, *, ended: bool) -> None:
        """Gives the sinks the report, and closes them."""
        if self._is_closed:
            return
        self._is_closed = True
        self._log.keep(self._folder / "report.html")
        self._log.close(ended=ended)
        self._tell()

    def _write_report(self) -> None:
        from rlalign.report import write_report

        with checkpoint.disk_errors(self._folder):
            write_report(self._folder)

    def _tell(self) -> None:
        for note in self._log.take_notes():
            self._on_record({"note": note})
