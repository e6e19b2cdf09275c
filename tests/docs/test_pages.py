"""The Markdown pages: their width, and that what they name is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, read

OWN = [
    file
    for folder in ("", "docs", "benchmarks", "docker", "cluster", "rlalign/assets")
    for file in sorted((ROOT / folder).glob("*.md"))
]
WIDEST = 100
_PATH = re.compile(
    r"(?<![\w/.-])((?:rlalign|tests|configs|benchmarks|docs|cluster|docker)/[\w./-]+)"
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMES = {"rlalign/denoising"}
"""What looks like a path and is a name of something else."""


def prose(text: str) -> list[tuple[int, str]]:
    """(number, line) of what is neither code nor a table, nor an image or one long link."""
    found = []
    fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("```"):
            fenced = not fenced
        elif not fenced and not stripped.startswith(("|", "![", "<")):
            found.append((number, line))
    return found


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()) for h in headings]
    return {h.replace(" ", "-") for h in plain}


@pytest.mark.parametrize("page", OWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_prose_is_wider_than_a_page(page: Path) -> None:
    """But for a single word, such as an address, that is longer by itself."""
    wide = [
        f"{page.name}:{number}: {len(line)} columns"
        for number, line in prose(read(page))
        if len(line) > WIDEST and len(line.split()) > 2
    ]
    assert wide == []


@pytest.mark.parametrize("page", OWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_is_there(page: Path) -> None:
    """Files and folders of the repository, in prose, tables and commands alike."""
    named = {path.rstrip(".") for path in _PATH.findall(read(page))} - NAMES
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", OWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file, and to a heading where an anchor is named; addresses of the web are not asked."""
    folder = (
        ROOT / "docs" if page.name == "canon_page.md" else page.parent
    )  # it becomes docs/canon.md
    broken = []
    for link in _LINK.findall(read(page)):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(read(target))):
            broken.append(link)
    assert broken == []


def test_the_site_has_every_page() -> None:
    """The table of contents names each page in docs/ once."""
    listed = re.findall(r"^([\w-]+)$", read(ROOT / "docs" / "index.md"), re.MULTILINE)
    pages = [page.stem for page in (ROOT / "docs").glob("*.md") if page.stem != "index"]
    assert sorted(listed) == sorted(pages)


def test_the_reference_has_every_plugin() -> None:
    """Each public module of the rooms that a plug-in is written against."""
    listed = set(re.findall(r"automodule:: (\S+)", read(ROOT / "docs" / "reference.md")))
    rooms = ("policies", "rewards", "algorithms", "samplers", "data/prompts", "sinks")
    rooms += ("diffusion", "engine", "learning/limits", "learning/optimizers")
    for room in (ROOT / "rlalign" / name for name in rooms):
        for file in room.glob("[!_]*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            assert name in listed, f"docs/reference.md lacks {name}"
    for name in listed:
        path = ROOT.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_the_docs_extra_is_pinned() -> None:
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    pins = {line.partition("==")[0].lower() for line in read(ROOT / "constraints.txt").splitlines()}
    wanted = {re.split(r"[>\[]", one)[0] for one in project["optional-dependencies"]["docs"]}
    assert wanted <= pins


def test_the_number_of_the_promise_is_right() -> None:
    """pyproject.toml refers to a promise of the README by its number."""
    (number,) = re.findall(r"# Promise (\d+) of the README", read(ROOT / "pyproject.toml"))
    assert re.search(rf"^{number}\. \*\*No pickle\.\*\*", read(ROOT / "README.md"), re.MULTILINE)
