"""A run as one self-contained HTML page: what it gained, before and after, its curves, and what it
cost.

Reads the run folder alone (``files``), so a page can be written again at any time, also for a run
that was stopped. ``numbers`` says it in words, ``rewards`` compares the rewards, ``gallery`` has
the pictures, ``charts`` chooses the curves that ``curves`` draws; ``pages`` fills in the templates,
of which ``report.html.j2`` is this page. To add a curve, add a line in ``charts``.
"""

from __future__ import annotations

from pathlib import Path

from rlalign.report.charts import charts
from rlalign.report.files import read_run
from rlalign.report.gallery import gallery, has_clips
from rlalign.report.numbers import comparison, cost, headline
from rlalign.report.pages import write_page
from rlalign.report.rewards import reward_table


def write_report(folder: Path) -> Path:
    """Writes ``report.html`` into a run folder, whole or not at all, and returns its path. Equal
    files give equal bytes."""
    run = read_run(folder)
    path = folder / "report.html"
    pictures = gallery(run)
    write_page(
        path,
        "report",
        run=run,
        name=run.config.get("name", folder.resolve().name),
        folder=folder.resolve().name,
        planned=run.config.get("rounds", run.done),
        headline=headline(run),
        comparison=comparison(run),
        rewards=reward_table(run),
        gallery=pictures,
        plays=has_clips(pictures),
        charts=charts(run),
        cost=cost(run),
        kl=(run.final or {}).get("kl/per_step_gaussian"),
    )
    return path
