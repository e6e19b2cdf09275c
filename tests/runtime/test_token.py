"""The token of a Ray that starts here: Ray reads it, and no other user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlalign.runtime.token import cluster_token, make_token


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where it lies, in a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".ray" / "auth_token"


def test_a_new_token_is_for_this_user_alone(file: Path) -> None:
    make_token()
    assert file.stat().st_mode & 0o777 == 0o600
    made = cluster_token()
    assert len(made) == 64 and int(made, 16)
    make_token()
    assert cluster_token() == made
    assert [one.name for one in file.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "mine"), ("RAY_AUTH_TOKEN_PATH", "/mine")],
)
def test_none_is_made_where_it_would_not_be_read(
    file: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    make_token()
    assert not file.exists()


def test_a_home_that_cannot_be_written_is_left_to_ray(file: Path) -> None:
    file.parent.write_text("a file in its place")
    make_token()
    assert file.parent.is_file()


@pytest.mark.ray
@pytest.mark.promise
def test_ray_takes_it(file: Path) -> None:
    """A Ray in a process of its own: it would have made one that everybody reads."""
    code = (
        "from rlalign.runtime.cluster import start_ray\n"
        "import ray\n"
        "start_ray(print, num_cpus=1, include_dashboard=False)\n"
        "assert ray.get(ray.remote(num_cpus=1)(lambda: 3).remote()) == 3\n"
        "ray.shutdown()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(cluster_token()) == 64
