"""The HTML page of ``rlalign evaluate``: the numbers, and the pictures side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.report import pages
from rlalign.report.gallery import cells

if TYPE_CHECKING:
    from rlalign.core.records import Scored


def write_page(
    path: Path,
    result: Mapping[str, Any],
    base: Sequence[Scored],
    aligned: Sequence[Scored],
    count: int,
) -> None:
    """Writes the self-contained page whole or not at all; ``base`` is empty where one model stands
    alone."""
    from rlalign.learning.evaluate import media_of

    prompts = [sample["prompt"] for sample in result["samples"]][:count]
    no_scores = [float("nan")] * len(prompts)
    columns = [
        cells(media_of(scored)[:count], prompts, no_scores) for scored in (base, aligned) if scored
    ]
    plays = any(cell.is_clip for column in columns for cell in column)
    shown = len(prompts)
    pages.write_page(path, "evaluation", result=result, columns=columns, shown=shown, plays=plays)
