"""What is left of the tests when a process that runs some of them ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENDS = "import os, time\ndef test_before(): pass\ndef test_ends(): os._exit(1)\n"
AFTER = "def test_after(): pass\n"
ONE = "def test_one(): pass\n"


def run_tests(folder: Path, files: dict[str, str], processes: int = 2) -> str:
    """What pytest says of test files, in as many processes."""
    for name, text in files.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    shared = ["-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder"]
    plugins = ["-p", "xdist", "-p", "tests.whole_files"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, *shared, str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.promise
def test_a_single_test_that_waits_behind_a_process_that_ended_is_run(tmp_path: Path) -> None:
    said = run_tests(
        tmp_path, {"test_a": ENDS, "test_b": ONE, "test_c": ONE, "test_d": ONE}, processes=1
    )
    assert "1 failed, 4 passed" in said, said
    assert "test_a.py::test_ends: the process that ran it has ended" in said


CUT_OFF = """import os
def pytest_runtest_logreport(report):
    late = "test_before" in report.nodeid and report.when == "teardown"
    if late and "PYTEST_XDIST_WORKER" not in os.environ:
        report.node.gateway._io.close_write()
"""


@pytest.mark.promise
def test_files_for_a_process_that_has_ended_unheard_are_run(tmp_path: Path) -> None:
    """The next file is handed out when its pipe is closed and before it is seen to have ended."""
    others = {f"test_{n}": ONE for n in "bcd"}
    said = run_tests(tmp_path, {"conftest": CUT_OFF, "test_a": ENDS, **others}, processes=1)
    assert "1 failed, 4 passed" in said, said
    assert "test_a.py::test_ends: the process that ran it has ended" in said


@pytest.mark.promise
def test_the_rest_of_its_file_is_run(tmp_path: Path) -> None:
    said = run_tests(tmp_path, {"test_a": ENDS + AFTER, "test_b": ONE}, processes=2)
    assert "1 failed, 3 passed" in said, said


@pytest.mark.promise
def test_more_than_one_may_end(tmp_path: Path) -> None:
    said = run_tests(
        tmp_path,
        {"test_a": ENDS, "test_b": ENDS, "test_c": ONE, "test_d": AFTER + ONE},
        processes=2,
    )
    assert "2 failed, 5 passed" in said, said


SAYS = """import os, pathlib
def test_says(): pathlib.Path({name!r}).write_text(os.environ["PYTEST_XDIST_WORKER"])
"""
WAITS = """import pathlib, time
def test_waits():
    while not pathlib.Path({name!r}).exists(): time.sleep(0.01)
"""


@pytest.mark.promise
def test_files_that_need_a_ray_go_to_one_process(tmp_path: Path) -> None:
    """The other process has enough to do: its first file waits for the last of them."""
    names = [f"tests/runtime/test_{n}" for n in "abc"]
    files = {name: SAYS.format(name=f"{tmp_path}/{name[-1]}") for name in names}
    files |= {f"test_{n}": WAITS.format(name=f"{tmp_path}/c") for n in "xyz"}
    said = run_tests(tmp_path, files, processes=2)
    assert "6 passed" in said, said
    assert len({(tmp_path / n).read_text() for n in "abc"}) == 1
