"""How test files are shared among processes: each goes whole to one, so that its fixtures are made
once.

pytest-xdist's own way of doing it waits for ever after a crash: a process runs a test only when it
holds the one after it too, or knows that there is none; one that replaces another is handed one
file, and told nothing more. And the test that ended its process is handed to the next.

Files that need a Ray go to one process as long as it has others beside it: they wait more than they
compute, while the others compute, and one Ray serves them all.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

RAY = ("tests/runtime/", "tests/cluster/")
"""Folders of the files that need a Ray."""


class WholeFiles(LoadFileScheduling):
    """Files in their order; of the file in which a process ended, the tests after it are run."""

    def _assign_work_unit(self, node: WorkerController) -> None:
        """Hands a process the next file of its kind, or of the other kind where none is left. From
        one that has ended meanwhile, remove_node takes it back."""
        for_ray = node == next(iter(self.nodes))
        fitting = (file for file in self.workqueue if file.startswith(RAY) == for_ray)
        chosen = next(fitting, None)
        if chosen is not None:
            self.workqueue.move_to_end(chosen, last=False)
        with contextlib.suppress(OSError):
            super()._assign_work_unit(node)

    def remove_node(self, node: WorkerController) -> str | None:
        """Takes back what a process has not run, but for the test that it was at, which is
        returned."""
        files = self.assigned_work.pop(node)
        left = [(file, test) for file, tests in files.items() for test in tests if not tests[test]]
        if not left:
            return None

        file, ended = left[0]
        files[file][ended] = True
        for name, tests in files.items():
            if not all(tests.values()):
                self.workqueue[name] = tests
        print(f"\n{ended}: the process that ran it has ended", file=sys.stderr, flush=True)
        self.schedule()
        return ended

    def schedule(self) -> None:
        """Hands out files until each process has two tests to run, or is told that no more come."""
        if self.collection is None:
            super().schedule()
        for node in self.nodes:
            while (
                node in self.registered_collections
                and not node.shutting_down
                and self._pending_of(self.assigned_work[node]) < 2
            ):
                self._reschedule(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> WholeFiles:
    return WholeFiles(config, log)
