"""A virtual environment of its own for a server: made of a requirements file, and kept.

What the file names, and what that needs, is installed into a folder of the user's cache; all else
(rlalign, Ray, torch unless it is named) comes from the environment that the command runs in. The
folder's name is a hash of the file, of that environment and of the Python version, so a file is
installed once, and a changed one anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import rlalign
from rlalign.core.registry import UserError

CACHE_ENV = "RLALIGN_CACHE"
"""Names the folder in place of ~/.cache/rlalign."""
_READY = "ready"
"""A file in an environment that is whole."""


def environment_of(
    requirements: Path, say: Callable[[str], None], hide: Sequence[str] = ()
) -> Path:
    """The folder of the environment that a requirements file describes; made where there is none.

    ``say`` is told what takes long. Environment variables of ``hide`` are kept from the installer,
    which may run code of packages. Raises UserError where the file is missing or cannot be
    installed.
    """
    try:
        content = requirements.read_bytes()
    except OSError as error:
        raise UserError(
            f"--env must name a requirements file, got {str(requirements)!r}: {error.strerror}"
        ) from error
    known = [content, sys.version.encode(), *(str(p).encode() for p in _parents())]
    if any(line.lstrip().startswith((b".", b"-")) for line in content.splitlines()):
        # a path or an option may mean something else in another folder
        known.append(str(requirements.resolve().parent).encode())
    name = hashlib.sha256(b"\0".join(known)).hexdigest()[:16]
    folder = cache_folder() / "environments" / name
    with _alone(folder):
        if not (folder / _READY).is_file():
            say(f"installing {requirements} into {folder}")
            _make(folder, requirements.resolve(), hide)
    return folder


def cache_folder() -> Path:
    """Where rlalign keeps what can be made again."""
    said = os.environ.get(CACHE_ENV, "")
    usual = Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache") / "rlalign"
    return Path(said) if said else usual


def python_of(folder: Path) -> Path:
    """The environment's Python."""
    return folder / "bin" / "python"


def inside(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a process that runs in the environment."""
    path = os.pathsep.join([str(folder / "bin"), environment.get("PATH", os.defpath)])
    changed = {**environment, "VIRTUAL_ENV": str(folder), "PATH": path}
    changed.pop("PYTHONHOME", None)
    return changed


def _parents() -> list[Path]:
    """Where the packages of this process come from, and rlalign itself."""
    paths = sysconfig.get_paths()
    own = [Path(paths["purelib"]), Path(paths["platlib"]), Path(rlalign.__file__).parents[1]]
    return list(dict.fromkeys(own))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other commands from making the same environment meanwhile."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(
            f"--env: cannot write to {folder.parent} ({error.strerror}); name another folder in"
            f" {CACHE_ENV}"
        ) from error


def _make(folder: Path, requirements: Path, hide: Sequence[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    uv = _uv()
    python = str(python_of(folder))
    if uv:
        made = [uv, "venv", "--quiet", "--python", sys.executable, str(folder)]
        install = [uv, "pip", "install", "--quiet", "--python", python]
    else:
        made = [sys.executable, "-m", "venv", str(folder)]
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    environment = {n: v for n, v in os.environ.items() if n not in (*hide, "VIRTUAL_ENV")}
    try:
        for command in (made, [*install, "--requirement", str(requirements)]):
            _run(command, requirements, environment)
        _look_into_parents(folder)
        (folder / _READY).write_bytes(requirements.read_bytes())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _uv() -> str:
    """The uv of this environment or of PATH, "" where there is none."""
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.is_file() else shutil.which("uv") or ""


def _run(command: Sequence[str], requirements: Path, environment: Mapping[str, str]) -> None:
    """Runs an installer in the file's folder, from which its relative paths count."""
    done = subprocess.run(
        command, cwd=requirements.parent, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = " ".join(lines[-6:]) or f"{Path(command[0]).name} ended with {done.returncode}"
        raise UserError(f"--env: {requirements} cannot be installed: {said[:600]}")


def _look_into_parents(folder: Path) -> None:
    """What is not installed here is looked for where this process has it: a .pth file, which
    Python reads at its start and whose folders come after its own."""
    [site] = (folder / "lib").glob("python*/site-packages")
    lines = [f"import site; site.addsitedir({str(path)!r})" for path in _parents()]
    (site / "rlalign_parents.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
