"""The commands that the README and the pages show, in order, with small overrides; and the README's
reward.

docs/cluster.md has ``make docs-check``, docs/extend.md a test of its own.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

import rlalign
from rlalign.cli import main
from tests.docs.pages import PAGES, ROOT, commands, read, write_files
from tests.runs import SMALL

RUN = [*(o for o in SMALL if not o.startswith("rewards=")), "rounds=2"]
SMALLER = {
    "train --resume": ["rounds=3"],
    "train configs/tiny_draft.yaml": [*RUN, "algorithm.last_steps=1"],
    "train": RUN,
    "sample": ["pictures=2", "plan.steps=3", "sampler.candidates=2"],
    "fit-reward": [
        "simulate.pairs=64",
        "simulate.plan.steps=2",
        "preferences.pairs_per_round=8",
        "preferences.pairs_per_pass=8",
        "contrastive.updates=2",
        "contrastive.batch=8",
        "fit.updates=2",
    ],
}
"""How a command begins -> what is added to it, so that it takes seconds."""
SHOWN = {
    page: found
    for page in PAGES
    if page.name not in ("cluster.md", "extend.md") and (found := commands(read(page)))
}


def arguments_of(command: str) -> list[str]:
    """A shown command's arguments, made small."""
    program, *arguments = shlex.split(command)
    assert program == ".venv/bin/rlalign", command
    begins = " ".join(arguments)
    more = next((small for start, small in SMALLER.items() if begins.startswith(start)), [])
    return arguments + more


def test_the_pages_with_commands() -> None:
    assert {page.name for page in SHOWN} == {"README.md", "algorithms.md", "models.md"}
    assert len(SHOWN[ROOT / "README.md"]) == 6


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_the_commands_of_a_page_work(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """In one folder, one after the other: each ends with 0."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for command in SHOWN[page]:
        code = main(arguments_of(command))
        out, err = capsys.readouterr()
        assert code == 0, f"{command}\n{out}\n{err}"


@pytest.mark.parametrize("command", [c for c in SHOWN[ROOT / "README.md"] if " list " in c])
def test_the_listing_of_the_readme(command: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments_of(command)) == 0
    assert "shapes" in capsys.readouterr().out


def test_the_reward_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grey has no colour; of two pixels, red and blue, the number by hand."""
    assert write_files(ROOT / "README.md", tmp_path) == ["colourful.py"]
    monkeypatch.syspath_prepend(str(tmp_path))
    score = rlalign.load_reward("colourful:Colourful")
    media = torch.full((2, 1, 3, 1, 2), 0.5)
    media[1, 0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    media[1, 0, :, 0, 1] = torch.tensor([0.0, 0.0, 1.0])
    # rg is (1, 0), yb (1/2, -1): unbiased spreads 1 / sqrt 2, 1.5 / sqrt 2; means 1/2, -1/4
    wanted = (0.5 + 1.125) ** 0.5 + 0.3 * (0.25 + 0.0625) ** 0.5
    assert score(media, ["a", "b"]).tolist() == pytest.approx([0.0, wanted])
