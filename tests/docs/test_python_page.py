"""docs/python.md and the notebook are one text, and it runs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from tests.docs.pages import ROOT, read

PAGE = ROOT / "docs" / "python.md"


def notebook_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "notebook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_the_page() -> None:
    """Made anew by: python docs/notebook.py."""
    kept = (ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8")
    assert kept == notebook_script().notebook(read(PAGE))


class Ran(NamedTuple):
    """What is there when every cell of the notebook has run, in order and in one namespace, as
    Jupyter does it."""

    folder: Path
    names: dict[str, Any]
    printed: list[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "configs").symlink_to(ROOT / "configs")
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        for number, cell in enumerate(code):
            exec(compile(cell, f"cell {number}", "exec"), names)
    return Ran(folder, names, printed.getvalue().splitlines())


@pytest.mark.promise
def test_what_the_cells_print_is_what_the_page_says(ran: Ran) -> None:
    assert ran.printed[0] == "torch.Size([3, 1, 3, 32, 32]) torch.uint8"
    assert len(list(ran.folder.glob("picture-*.png"))) == 3
    assert "the score rises by brighter pixels on the left: True" in ran.printed
    assert ran.names["metrics"]["ratio/first_update"] == 0.0
    assert ran.names["metrics"]["grad_norm"] > 0.0
    assert (ran.names["again"] != ran.names["media"]).any()


@pytest.mark.promise
def test_the_round_by_hand_is_a_runs_first(ran: Ran) -> None:
    """Its metrics are those of the first line that ``train_local`` writes."""
    lines = Path(ran.folder, ran.names["folder"], "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    metrics = ran.names["metrics"]
    for key in metrics.keys() & first.keys():
        assert metrics[key] == first[key], key
    assert {"grad_norm", "ratio/first_update"} <= metrics.keys() & first.keys()
