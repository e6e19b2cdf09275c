"""A run as one self-contained HTML page: what it gained, before and after, its curves, and what it cost.

Reads the run folder alone (``files``), so a page can be written again at any time, also for a run that was stopped. ``numbers``
says it in words, ``gallery`` has the pictures, ``charts`` chooses the curves that ``curves`` draws; the page itself is
``rlalign/assets/report.html.j2``. To add a curve, add a line in ``charts``.
"""

from __future__ import annotations

import os
from pathlib import Path

from rlalign.report.charts import charts
from rlalign.report.files import read_run
from rlalign.report.gallery import gallery, picture_uri
from rlalign.report.numbers import clock, comparison, cost, headline, number, signed

TEMPLATE = Path(__file__).parent.parent / "assets" / "report.html.j2"


def write_report(folder: Path) -> Path:
    """Writes ``report.html`` into a run folder, whole or not at all, and returns its path. Equal files give equal bytes."""
    from jinja2 import Environment, StrictUndefined

    run = read_run(folder)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, signed=signed, clock=clock, uri=picture_uri)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        name=run.config.get("name", folder.resolve().name),
        folder=folder.resolve().name,
        planned=run.config.get("rounds", run.done),
        headline=headline(run),
        comparison=comparison(run),
        gallery=gallery(run),
        charts=charts(run),
        cost=cost(run),
        kl=(run.final or {}).get("kl/per_step_gaussian"),
    )
    path = folder / "report.html"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(html, encoding="utf-8")
    os.replace(scratch, path)
    return path
