"""The commands that the pages show, run in order in one shell: ``make docs-check``.

A block of ```bash is run. ``<!-- wait: FILE -->`` before one waits until the file is there, as a reader would;
``<!-- not run: REASON -->`` leaves one out.
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

ROOT = Path(__file__).parents[2]
PAGES = ("cluster.md",)
_BLOCK = re.compile(r"(?:<!-- (wait|not run): (.+?) -->\n)?```bash\n(.*?)```", re.DOTALL)


def script(page: str) -> str:
    """The page's commands as one script, waits written out."""
    lines = ["set -euxo pipefail"]
    for kind, what, commands in _BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8")):
        if kind == "not run":
            continue
        if kind == "wait":
            lines.append(f"for i in $(seq 600); do [ -s {what} ] && break; sleep 0.2; done; [ -s {what} ]")
        lines.append(commands)
    return "\n".join(lines)


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A folder in which the repository's paths hold; whatever was started there is gone afterwards."""
    for name in ("cluster", "configs", "docker"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
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
        done = subprocess.run(["bash", "-c", script(page)], cwd=workplace, env=environment, stdout=out, stderr=out)
    print(log.read_text())
    assert done.returncode == 0, log.read_text()[-5000:]


def test_the_pages_have_commands() -> None:
    assert script("cluster.md").count("rlalign ") >= 12
