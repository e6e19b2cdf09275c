"""How a long training shows where it is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

Report = Callable[[str, int, int, float], None]
"""(stage, updates done, updates in all, loss) after every update."""

Tell = Callable[[int, int], None]
"""(done, of) how many pieces of work, after every piece."""


def tell_nobody(done: int, of: int) -> None:
    """A ``Tell`` where nobody looks."""


@contextlib.contextmanager
def console_progress() -> Iterator[Report]:
    """A progress bar per stage on a terminal, a line every hundredth of a stage elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console()
    if not console.is_terminal:
        yield _plain_lines
        return
    # a bar for each stage that has begun
    text = TextColumn("{task.description} loss {task.fields[loss]:.4f}")
    with Progress(
        text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bars:
        tasks: dict[str, Any] = {}
        smooth: dict[str, float] = {}

        def report(stage: str, done: int, total: int, loss: float) -> None:
            smooth[stage] = 0.98 * smooth.get(stage, loss) + 0.02 * loss
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, loss=loss)
            bars.update(tasks[stage], completed=done, loss=smooth[stage])

        yield report


def _plain_lines(stage: str, done: int, total: int, loss: float) -> None:
    if done == total or done % max(1, total // 100) == 0:
        print(f"{stage} {done}/{total} loss {loss:.4f}", file=sys.stderr, flush=True)
