"""The HTML page of ``rlalign evaluate``: the numbers, and the pictures side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.records import Scored

TEMPLATE = Path(__file__).parent.parent / "assets" / "evaluation.html.j2"


def write_page(
    path: Path, result: Mapping[str, Any], base: Sequence[Scored], aligned: Sequence[Scored], count: int
) -> None:
    """Writes the self-contained page whole or not at all; ``base`` is empty where one model stands alone."""
    from jinja2 import Environment, StrictUndefined

    from rlalign.checkpoint import write_text
    from rlalign.report.numbers import number, signed

    columns = [_pictures(scored, count) for scored in (base, aligned) if scored]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, signed=signed)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    write_text(path, page.render(result=result, columns=columns, shown=len(columns[0])))


def _pictures(scored: Sequence[Scored], count: int) -> list[str]:
    """Data URIs of the first pictures (a video's first frame)."""
    from PIL import Image

    from rlalign.evaluate import media_of
    from rlalign.report.gallery import Cell, picture_uri

    media_NCHW = media_of(scored)[:count, 0]
    pictures = [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in media_NCHW]
    return [picture_uri(Cell(picture=picture, caption="", score=None)) for picture in pictures]
