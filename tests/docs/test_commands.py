"""The commands that the pages show, run in order in one shell: ``make docs-check``.

A block of ```bash is run. ``<!-- wait: FILE -->`` before one waits until the file is there, as a
reader would; ``<!-- not run: REASON -->`` leaves one out. After those of cluster.md come, on the
same cluster, Ray's own commands: the right column of a table with the heading
``| rlalign | Ray |``, with a run of their own in place of what they name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlalign.config import dump, load_run

ROOT = Path(__file__).parents[2]
PAGES = ("cluster.md", "rewards.md")
SMALLER = "--local rounds=1 plan.steps=3 prompts.per_round=4 evaluate.prompts=4 evaluate.every=1"
"""Added to a training of rewards.md, so that it takes seconds."""
VERBS = ("submit", "status", "logs", "list", "stop")
OWN = {"first": "own", "again": "own-again", "FOLDER": "own", "DIR": "$PWD/runs/own"}
"""What Ray's commands name -> what they are given here."""
_TABLE = re.compile(r"^\| rlalign \| Ray \|\n\|---\|---\|\n((?:\|.*\|\n)+)", re.MULTILINE)
_BLOCK = re.compile(r"(?:<!-- (wait|not run): (.+?) -->\n)?```bash\n(.*?)```", re.DOTALL)


def rays_commands(page: str) -> list[str]:
    """The commands of the table's right column, in order."""
    rows = "".join(_TABLE.findall((ROOT / "docs" / page).read_text(encoding="utf-8")))
    return [
        command
        for row in rows.splitlines()
        for command in re.findall(r"`(ray .+?)`", row.split("|")[2])
    ]


def rays_script(page: str) -> str:
    """The same as a script, which waits for the run that the first one starts."""
    lines = []
    for number, command in enumerate(rays_commands(page)):
        words = [OWN.get(word, word) for word in command.split()]
        lines.append(" ".join(words))
        if number == 0:
            lines.append(waiting_for("runs/own/metrics.jsonl"))
    return "\n".join(lines)


def waiting_for(path: str) -> str:
    """Two minutes at most."""
    return f"for i in $(seq 600); do [ -s {path} ] && break; sleep 0.2; done; [ -s {path} ]"


def script(page: str) -> str:
    """The page's commands as one script, waits written out, and what would take long made
    small."""
    lines = ["set -euxo pipefail"]
    for kind, what, commands in _BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8")):
        if kind == "not run":
            continue
        if kind == "wait":
            lines.append(waiting_for(what))
        if page == "rewards.md":
            commands = re.sub(r"^(rlalign train .+)$", rf"\1 {SMALLER}", commands, flags=re.M)
        lines.append(commands)
    return "\n".join(lines)


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A folder in which the repository's paths hold; whatever was started there is gone
    afterwards."""
    for name in ("cluster", "configs", "docker"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "own").mkdir()
    small = [
        "rounds=1000",
        "checkpoint.every=2",
        "prompts.per_round=4",
        "evaluate.prompts=8",
        "evaluate.grid=4",
    ]
    (tmp_path / "own" / "run.yaml").write_text(
        dump(load_run(ROOT / "configs" / "quickstart.yaml", small))
    )
    yield tmp_path
    for process in psutil.process_iter():
        try:
            if process.environ().get("RLALIGN_DOCS_CHECK") == str(tmp_path):
                process.kill()
        except psutil.Error:
            continue


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_works(page: str, workplace: Path) -> None:
    environment = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
    environment |= {"HOME": str(workplace), "RLALIGN_DOCS_CHECK": str(workplace)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    log = workplace / "log.txt"
    with log.open("w") as out:
        rays_own = ["ray job stop again", rays_script(page)] if rays_commands(page) else []
        commands = "\n".join([script(page), *rays_own])
        done = subprocess.run(
            ["bash", "-c", commands], cwd=workplace, env=environment, stdout=out, stderr=out
        )
    print(log.read_text())
    assert done.returncode == 0, log.read_text()[-5000:]


def test_the_pages_have_commands() -> None:
    assert script("cluster.md").count("rlalign ") >= 12
    served, trained = (
        line for line in script("rewards.md").splitlines() if line.startswith("rlalign ")
    )
    assert served.startswith("rlalign serve-reward ocr ") and "--env ocr.txt" in served
    assert trained.endswith(SMALLER)


def test_the_table_has_rays_own_commands() -> None:
    commands = rays_commands("cluster.md")
    assert {" ".join(command.split()[:3]) for command in commands} >= {
        f"ray job {verb}" for verb in VERBS
    }
    assert [
        word
        for command in commands
        for word in command.split()
        if word.isupper() and word not in OWN
    ] == []
