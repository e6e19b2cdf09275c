"""How Sphinx builds the site: ``make docs``. The pages are Markdown; the reference is read from the
docstrings, which are plain text with ``code`` in double backquotes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).parent.parent

project = "rlalign"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "rlalign"
exclude_patterns = ["images"]
root_doc = "index"
nitpicky = False
myst_heading_anchors = 4
suppress_warnings = ["misc.highlighting_failure"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "model_config, model_post_init"}

OUTSIDE = {
    "index": "README.md",
    "contributing": "CONTRIBUTING.md",
    "notes": "benchmarks/NOTES.md",
}
"""Page of the site -> the file outside of docs/ that it shows."""
_LITERAL = re.compile(r"(``.+?``)")


def _read_page(app: Any, page: str, content: list[str]) -> None:
    """Takes pages from outside in, and turns links to them into links within the site."""
    if page in OUTSIDE:
        text = (ROOT / OUTSIDE[page]).read_text(encoding="utf-8")
        # as it would read in docs/: what is there needs no folder, what is not lies above
        text = text.replace("](../docs/", "](docs/")
        text = re.sub(r"\]\((?!docs/|https?:|#)", "](../", text).replace("](docs/", "](")
        content[0] = text + content[0]
    for name, file in OUTSIDE.items():
        content[0] = content[0].replace(f"](../{file}", f"]({name}.md")


def _plain(text: str) -> str:
    """What is no ``code`` is text: its stars, bars and underscores mean themselves."""
    parts = _LITERAL.split(text)
    parts[::2] = [re.sub(r"([*|`]|_\b)", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _read_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list) -> None:
    """Indented parts are code or drawings; the settings of a recipe follow its docstring."""
    read: list[str] = []
    for line in lines:
        indented = line.startswith(" ")
        if indented and read and not read[-1] and not any(r.startswith(" ") for r in read[-2:-1]):
            read += ["::", ""]
        read.append(line if indented else _plain(line))
    if what == "class" and isinstance(obj, type) and issubclass(obj, BaseModel):
        for field, info in obj.model_fields.items():
            if info.description:
                default = "required" if info.is_required() else repr(info.default)
                read += ["", f"``{field}`` = ``{default}``: {_plain(info.description)}"]
    lines[:] = [*read, ""]


def setup(app: Any) -> None:
    app.connect("source-read", _read_page)
    app.connect("autodoc-process-docstring", _read_docstring)
