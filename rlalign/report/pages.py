"""The one Jinja environment: every page of rlalign is a template that extends ``base.html.j2``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlalign.core.files import write_whole
from rlalign.report.gallery import film_uri, picture_uri, still_uri
from rlalign.report.numbers import clock, hundredths, number, signed

_FOLDER = Path(__file__).parent / "templates"


def write_page(path: Path, template: str, **values: Any) -> None:
    """Writes a self-contained page whole or not at all: ``templates/TEMPLATE.html.j2`` with these
    values. Equal values give equal bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, signed=signed, clock=clock)
    environment.filters.update(uri=picture_uri, film=film_uri, still=still_uri)
    environment.filters["hundredths"] = hundredths
    write_whole(path, environment.get_template(f"{template}.html.j2").render(**values))
