"""Which folder a local Ray keeps its files in, and what is said of one that does not serve."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlalign.core.registry import UserError
from rlalign.runtime import cluster, temporary

LONG = "slurm_jobdir_of_a_long_name/1355700/tmp.t0016-node-0042.cluster.example"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder of the test's own, in the place of /tmp."""
    folder = Path(f"/tmp/rt{os.getpid()}")
    folder.mkdir()
    monkeypatch.setattr(temporary, "COMMON", (str(folder / "a"), str(folder / "b")))
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    shutil.rmtree(folder)


def chosen() -> tuple[Path, list[str]]:
    notes: list[str] = []
    return temporary.temporary_folder(notes.append), notes


def test_what_serves_is_taken_without_a_word(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen() == (short / "a", [])
    monkeypatch.setenv("TMPDIR", str(short / "t"))
    assert chosen() == (short / "t", [])
    monkeypatch.setenv("RAY_TMPDIR", str(short / "r"))
    assert chosen() == (short / "r", [])
    monkeypatch.chdir(short)
    monkeypatch.setenv("RAY_TMPDIR", "relative")
    assert chosen() == (short / "relative", []), "Ray's processes have folders of their own"


def spoil(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that does not serve."""
    if how == "long":
        return folder / LONG
    if how == "a file":
        (folder / "x").write_text("")
        return folder / "x"
    if how == "taken":  # another user's `ray`
        (folder / "x").mkdir()
        (folder / "x" / "ray").write_text("")
        return folder / "x"
    if how == "read-only":
        return Path("/proc/self")
    if how == "a loop":
        (folder / "x").symlink_to("x")
        return folder / "x"
    usage = shutil.disk_usage(folder)._replace(free=2**20)
    whole = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage if "full" in str(path) else whole(path)
    )
    return folder / "full"


FAULTS = {
    "long": "bytes too long for the Unix sockets that Ray puts into it",
    "a file": "cannot be written (",
    "taken": "cannot be written (",
    "read-only": "cannot be written (",
    "a loop": "cannot be written (",
    "full": "has 1 MB of free space, of which Ray needs 16",
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_tmpdir_that_does_not_serve_is_replaced(
    how: str, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = spoil(short, how, monkeypatch)
    monkeypatch.setenv("TMPDIR", str(spoiled))
    folder, [said] = chosen()
    assert folder == short / "a" / f"rlalign-{os.getuid()}"
    assert said.startswith(f"TMPDIR {str(spoiled)!r} ") and FAULTS[how] in said
    assert said.endswith(f"Ray's files are in {folder} instead (RAY_TMPDIR names another folder)")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert chosen()[0] == folder, "the same one the next time"


@pytest.mark.parametrize("how", FAULTS)
def test_a_ray_tmpdir_that_does_not_serve_is_refused(
    how: str, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = spoil(short, how, monkeypatch)
    monkeypatch.setenv("RAY_TMPDIR", str(spoiled))
    with pytest.raises(UserError, match="RAY_TMPDIR must be a folder that Ray can use") as refused:
        cluster.connect([], "cpu", None)
    assert str(spoiled) in str(refused.value) and FAULTS[how] in str(refused.value)


@pytest.mark.parametrize("squatter", ["link", "open"])
def test_a_folder_that_others_may_have_made_is_not_taken(
    squatter: str, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short / LONG))
    name = f"rlalign-{os.getuid()}"
    if squatter == "link":
        (short / "theirs").mkdir()
        (short / "a" / name).symlink_to(short / "theirs")
    else:
        (short / "a" / name).mkdir()
        (short / "a" / name).chmod(0o777)
    assert chosen()[0] == short / "b" / name
    (short / "b" / name).rename(short / "c")
    (short / "b" / name).symlink_to(short / "c")
    with pytest.raises(UserError, match="name a short folder that can be written in RAY_TMPDIR"):
        chosen()


def test_tmpdir_is_short_for_rays_processes_alone(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(short / LONG))
    with temporary.short_tmpdir(short / "r"):
        assert os.environ["TMPDIR"] == str(short / "r")
    assert os.environ["TMPDIR"] == str(short / LONG)
    monkeypatch.setenv("TMPDIR", str(short))
    with temporary.short_tmpdir(short / "r"):
        assert os.environ["TMPDIR"] == str(short)
