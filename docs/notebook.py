"""Writes docs/tutorial.ipynb from docs/python.md: prose becomes text cells, code becomes code
cells. ``python docs/notebook.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
CODE = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def cells_of(page: str) -> list[tuple[str, str]]:
    """("markdown" or "code", text) in order."""
    parts = CODE.split(page)
    kinds = ["markdown", "code"] * len(parts)
    return [(kind, part.strip()) for kind, part in zip(kinds, parts, strict=False) if part.strip()]


def notebook(page: str) -> str:
    """The page as a notebook of format 4.5."""
    cells: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells_of(page)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell | {"source": text.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    (DOCS / "tutorial.ipynb").write_text(notebook(text), encoding="utf-8")
