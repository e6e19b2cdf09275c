"""What the pages show, taken apart: files with their names, and commands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
]
_FILE = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
_CONSOLE = re.compile(
    r"^(<!-- not run: .+ -->\n)?```console\n(.*?)^```\n", re.DOTALL | re.MULTILINE
)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def write_files(page: Path, folder: Path) -> list[str]:
    """Writes the files that a page shows. Returns their names."""
    found = _FILE.findall(read(page))
    for name, text in found:
        (folder / name).write_text(text, encoding="utf-8")
    return [name for name, _ in found]


def commands(text: str) -> list[str]:
    """The lines of a text's console blocks, without what follows a #; a block that says why it is
    not run is left out."""
    blocks = [block for reason, block in _CONSOLE.findall(text) if not reason]
    lines = [line for block in blocks for line in block.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.split(" #")[0].strip()]
