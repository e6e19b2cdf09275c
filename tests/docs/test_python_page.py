"""docs/python.md and the notebook are one text, and it runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

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


def test_every_cell_of_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In order, in one namespace, as Jupyter does; what it prints is what the page says."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(code):
        exec(compile(cell, f"cell {number}", "exec"), names)
    printed = capsys.readouterr().out.splitlines()

    assert printed[0] == "torch.Size([3, 1, 3, 32, 32]) torch.uint8"
    assert len(list(tmp_path.glob("picture-*.png"))) == 3
    assert "the score rises by brighter pixels on the left: True" in printed
    assert names["metrics"]["ratio/first_update"] == 0.0
    assert names["metrics"]["grad_norm"] > 0.0
    assert (names["again"] != names["media"]).any()


def test_the_round_by_hand_is_a_runs_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metrics are those of the first line that ``train_local`` writes."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    script = notebook_script()
    code = [text for kind, text in script.cells_of(read(PAGE)) if kind == "code"]
    names: dict = {"__name__": "__main__"}
    wanted = [c for c in code if c.startswith(("import rlalign", "from pathlib", "from rlalign"))]
    wanted += [c for c in code if c.startswith("import tempfile")]
    for cell in wanted:
        exec(compile(cell, "cell", "exec"), names)
    first = json.loads((names["folder"] / "metrics.jsonl").read_text().splitlines()[0])
    metrics = names["metrics"]
    for key in metrics.keys() & first.keys():
        assert metrics[key] == first[key], key
    assert {"grad_norm", "ratio/first_update"} <= metrics.keys() & first.keys()
