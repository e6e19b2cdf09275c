"""``rlalign serve-reward --env``: a virtual environment of a requirements file, without an index:
the packages are wheels that are made here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rlalign.cli import main
from rlalign.core.registry import UserError, build
from rlalign.rewards.base import score
from rlalign.runtime import environments
from rlalign.web.token import TOKEN_ENV

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-a-test-0123456789"


def write_wheel(folder, name, code, version="99.0"):
    """A wheel with one module."""
    file = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    parts = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*parts, f"{info}/RECORD"])
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in {**parts, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(environments.CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def requirements(tmp_path):
    """A package that is new, and another version of one that the tests have: by relative paths."""
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", "made_up_scores", "BRIGHT = 7.0\n")
    write_wheel(tmp_path / "wheels", "cfgv", "VERSION = '99.0'\n")
    file = tmp_path / "requirements.txt"
    lines = [f"./wheels/{name}-99.0-py3-none-any.whl" for name in ("made_up_scores", "cfgv")]
    file.write_text("\n".join(lines) + "\n")
    return file


def seen_by(folder):
    """What its Python imports: the new package, the other version, rlalign and torch as here."""
    code = (
        "import json, cfgv, made_up_scores, importlib.util as u;"
        "print(json.dumps([cfgv.VERSION, made_up_scores.BRIGHT,"
        " u.find_spec('rlalign').origin, u.find_spec('torch').origin]))"
    )
    done = subprocess.run(
        [environments.python_of(folder), "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environments.inside(folder, {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("tool", ["uv", pytest.param("pip", marks=pytest.mark.promise)])
def test_the_files_packages_come_first_and_the_rest_is_that_of_the_run(
    requirements, monkeypatch, tool
):
    import torch

    import rlalign

    if tool == "pip":
        monkeypatch.setattr(environments, "_uv", lambda: "")
    elif not environments._uv():
        pytest.skip("there is no uv")
    folder = environments.environment_of(requirements, print)
    assert seen_by(folder) == ["99.0", 7.0, rlalign.__file__, torch.__file__]
    import cfgv

    assert not hasattr(cfgv, "VERSION")


def test_it_is_made_once_and_anew_for_a_changed_file(requirements, monkeypatch):
    said = []
    first = environments.environment_of(requirements, said.append)
    assert environments.environment_of(requirements, said.append) == first
    assert said == [f"installing {requirements} into {first}"]
    requirements.write_text(requirements.read_text() + "# another\n")
    assert environments.environment_of(requirements, said.append) != first
    # one that was broken off is made again
    (first / "ready").unlink()
    requirements.write_text(requirements.read_text().removesuffix("# another\n"))
    assert environments.environment_of(requirements, said.append) == first
    assert len(said) == 3


def test_a_file_that_cannot_be_installed_leaves_nothing_behind(tmp_path, requirements):
    requirements.write_text("no-such-package-anywhere==1.0\n")
    with pytest.raises(UserError, match=r"--env: \S+requirements\.txt cannot be installed: ") as e:
        environments.environment_of(requirements, print)
    assert "no-such-package-anywhere" in str(e.value)
    assert not [p for p in (tmp_path / "cache" / "environments").iterdir() if p.is_dir()]


def test_mistakes_of_the_command_are_said_before_anything_is_installed(
    tmp_path, requirements, capsys
):
    cases = {
        ("--env", str(tmp_path / "none.txt")): "--env must name a requirements file",
        ("--env", str(requirements), "--address", "auto"): "the nodes of the cluster need the",
        ("--env", str(requirements), "server.gpu=1"): "gpu: unknown setting",
    }
    for arguments, said in cases.items():
        assert main(["serve-reward", "jpeg", *arguments]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "cache" / "environments").exists()


def test_the_installer_does_not_see_the_token(requirements, monkeypatch):
    monkeypatch.setenv(TOKEN_ENV, TOKEN)
    seen = []
    own = subprocess.run

    def looked_at(command, **more):
        seen.append(TOKEN in (more.get("env") or os.environ).values())
        return own(command, **more)

    monkeypatch.setattr(environments.subprocess, "run", looked_at)
    environments.environment_of(requirements, print, hide=[TOKEN_ENV])
    assert seen == [False, False]


@pytest.mark.slow
@pytest.mark.ray
def test_a_reward_is_served_with_packages_that_the_run_does_not_have(
    tmp_path, requirements, monkeypatch
):
    """Its scores come from a package of the file; nobody here can import it."""
    monkeypatch.setenv(TOKEN_ENV, TOKEN)
    (tmp_path / "bright.py").write_text(
        "import made_up_scores, cfgv\n"
        "def score(media, prompts):\n"
        "    assert cfgv.VERSION == '99.0'\n"
        "    return media.flatten(1).mean(1) * made_up_scores.BRIGHT\n"
    )
    command = [sys.executable, "-m", "rlalign", "serve-reward", "function", "call=bright:score"]
    output = tmp_path / "output.txt"
    with output.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", "0", "--env", str(requirements)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        )
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", output.read_text())):
            assert process.poll() is None, output.read_text()
            time.sleep(0.05)
        # the command that listens is the one that was started, and its arguments hold no token
        arguments = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
        assert arguments[0].startswith(str(tmp_path / "cache"))
        assert "--env" not in arguments and TOKEN not in arguments
        client = build("rewards", {"name": "http", "url": found.group(0)})
        media = np.full((2, 1, 3, 4, 4), 255, dtype=np.uint8)
        assert score(client, client.load("cpu"), media, ["a", "b"]).tolist() == [7.0, 7.0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(600)
    assert process.returncode == 0
    with pytest.raises(ImportError):
        __import__("made_up_scores")
