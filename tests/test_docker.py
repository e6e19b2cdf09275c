"""The images: their structure, and their install steps run in a clean virtual environment, since no
Docker may be at hand."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
KINDS = ("cpu", "gpu")
INSTALLS = re.compile(r"pip install|install\.py")


@dataclass(frozen=True)
class Step:
    """One instruction of a Dockerfile."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        return [w for w in shlex.split(self.text) if not w.startswith(("--chown=", "--mount="))]


def steps(kind: str) -> list[Step]:
    """The instructions of docker/Dockerfile.KIND, continued lines joined."""
    text = re.sub(
        r"^\s*#.*\n", "", (ROOT / f"docker/Dockerfile.{kind}").read_text(), flags=re.MULTILINE
    )
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [Step(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def copies(kind: str) -> list[tuple[list[str], str]]:
    return [(s.words[:-1], s.words[-1]) for s in steps(kind) if s.name == "COPY"]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the repository out; the last rule that matches it or a
    folder above decides."""
    out = False
    above = [path, *(str(p) for p in Path(path).parents)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        rule = line.strip()
        if rule and not rule.startswith("#"):
            pattern = rule.removeprefix("!").removeprefix("**/")
            names = [*above, *(Path(p).name for p in above)] if "**/" in rule else above
            if any(fnmatch.fnmatchcase(name, pattern) and name != "." for name in names):
                out = not rule.startswith("!")
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_pinned_and_the_user_is_nobody_special(kind: str) -> None:
    names = [s.name for s in steps(kind)]
    assert names[0] == "FROM" and names.count("FROM") == 1
    image, _, tag = steps(kind)[0].text.partition(":")
    assert image and re.match(r"\d+\.\d+\.\d+", tag), "a full version, never latest"
    users = [s.text for s in steps(kind) if s.name == "USER"]
    assert users and all(re.fullmatch(r"[1-9]\d*:[1-9]\d*", u) for u in users), (
        "numbers, which Kubernetes can check"
    )
    first_user = names.index("USER")
    installs = [i for i, s in enumerate(steps(kind)) if INSTALLS.search(s.text)]
    assert installs and min(installs) > first_user, "nothing of pip's runs as root"
    assert "EXPOSE" not in names


def test_all_nodes_of_a_cluster_run_one_python() -> None:
    assert steps("cpu")[0] == steps("gpu")[0]
    python = ".".join(steps("cpu")[0].text.partition(":")[2].split(".")[:2])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]


@pytest.mark.parametrize("kind", KINDS)
def test_dependencies_come_before_the_code(kind: str) -> None:
    found = steps(kind)
    code = next(i for i, s in enumerate(found) if s.name == "COPY" and "rlalign" in s.words[:-1])
    dependencies = next(
        i for i, s in enumerate(found) if s.name == "RUN" and "-r requirements.txt" in s.text
    )
    assert dependencies < code
    before = {source for s in found[:dependencies] if s.name == "COPY" for source in s.words[:-1]}
    assert before == {
        "pyproject.toml",
        "constraints.txt",
        "docker/requirements.py",
        "docker/install.py",
    }
    (install,) = (s.text for s in found[code:] if s.name == "RUN" and INSTALLS.search(s.text))
    assert "--no-deps" in install and "--no-index" in install, "the code's layer fetches nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_copied_exists_and_is_not_ignored(kind: str) -> None:
    for sources, _ in copies(kind):
        for source in sources:
            assert (ROOT / source).exists(), source
            assert not ignored(source), source


def test_what_must_stay_outside_is_ignored() -> None:
    for path in (
        ".git/config",
        ".venv/bin/python",
        "runs/x/config.yaml",
        "tests/runs.py",
        "rlalign/__pycache__/x.pyc",
        ".env",
    ):
        assert ignored(path), path
    assert not ignored("rlalign/config/settings.py")


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_can_stay_in_a_layer(kind: str) -> None:
    found = steps(kind)
    assert not [s for s in found if s.name == "ARG"], "a build argument is in the image's history"
    assert not [
        s
        for s in found
        if s.name == "ENV" and re.search(r"(?i)token|secret|password|_key|index_url", s.text)
    ]
    (install,) = (s.text for s in found if "-r requirements.txt" in s.text)
    assert "--mount=type=secret,id=pip,target=/etc/pip.conf" in install


@pytest.mark.parametrize("kind", KINDS)
def test_what_launchers_need_is_there(kind: str) -> None:
    """`ray up` copies by rsync, KubeRay's probes are wget's; both start login shells, which take
    PATH from profile.d."""
    system = next(s.text for s in steps(kind) if "apt-get install" in s.text)
    assert {"rsync", "wget", "procps"} <= set(system.split())
    assert any("/etc/profile.d/" in s.text and "/opt/venv/bin" in s.text for s in steps(kind))
    user = next(s.text for s in steps(kind) if s.name == "USER").split(":")[0]
    cluster = yaml.safe_load((ROOT / "cluster/kuberay/raycluster.yaml").read_text())["spec"]
    assert cluster["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] == int(user)


def build(kind: str, folder: Path) -> Path:
    """Runs what the Dockerfile does as its user, in ``folder`` in place of the image's root.
    Returns the environment's bin."""
    moved = {
        "/opt/venv": folder / "venv",
        "/home/rlalign": folder / "home",
        "/var/cache/packages": folder / "cache",
    }
    as_user = False
    where = folder / "home"
    bin = folder / "venv" / "bin"
    python = folder / "bin" / "python"  # what the base image calls python
    python.parent.mkdir(parents=True)
    python.symlink_to(
        Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    )
    path = f"{bin}:{python.parent}:/usr/bin:/bin"

    def inside(text: str) -> str:
        for old, new in moved.items():
            text = re.sub(rf"(?<![\w/]){re.escape(old)}(?![\w-])", str(new), text)
        return text

    for step in steps(kind):
        if step.name == "USER":
            as_user = True
        elif step.name == "WORKDIR":
            where = Path(inside(step.text))
            where.mkdir(parents=True, exist_ok=True)
        elif step.name == "COPY":
            for source in step.words[:-1]:
                target = where / inside(step.words[-1])
                if (ROOT / source).is_dir():
                    shutil.copytree(
                        ROOT / source,
                        target,
                        ignore=shutil.ignore_patterns("__pycache__"),
                        dirs_exist_ok=True,
                    )
                else:
                    shutil.copy(
                        ROOT / source,
                        target / Path(source).name if step.text.endswith("/") else target,
                    )
        elif step.name == "RUN" and as_user:
            command = inside(re.sub(r"--mount=\S+\s+", "", step.text))
            done = subprocess.run(
                ["bash", "-ec", command],
                cwd=where,
                env=pip_environment() | {"PATH": path},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return bin


def pip_environment() -> dict[str, str]:
    """Where packages come from is pip's business; nothing of this process's Python goes along."""
    kept = ("PIP_", "HOME", "LANG", "SSL_", "REQUESTS_", "HTTP", "http", "NO_PROXY", "no_proxy")
    return {k: v for k, v in os.environ.items() if k.startswith(kept)}


WHEEL = {
    "small.py": "IT_IS = 'installed'\n",
    "small-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n",
    "small-1.0.dist-info/WHEEL": (
        "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ),
    "small-1.0.dist-info/RECORD": "small.py,,\nsmall-1.0.dist-info/METADATA,,\n"
    "small-1.0.dist-info/WHEEL,,\nsmall-1.0.dist-info/RECORD,,\n",
}
"""The files of a package of one line."""
UV = Path(sys.executable).with_name("uv")


@pytest.mark.slow
@pytest.mark.parametrize("with_uv", [False, True], ids=["without uv", "with uv"])
def test_a_pip_conf_says_where_packages_come_from(tmp_path: Path, with_uv: bool) -> None:
    """In it a folder, and no index: pip and uv both find the package there; uv too, where it is."""
    if with_uv and not UV.is_file():
        pytest.skip("needs uv beside this Python, as make installs it")
    packages, venv = tmp_path / "packages", tmp_path / "venv"
    packages.mkdir()
    with zipfile.ZipFile(packages / "small-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in WHEEL.items():
            wheel.writestr(name, text)
    if with_uv:
        wheel_of_uv(packages)
    (tmp_path / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {packages}\n")
    (tmp_path / "constraints.txt").write_text("small==1.0\n")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    done = subprocess.run(
        [venv / "bin" / "python", ROOT / "docker" / "install.py", "-c", "constraints.txt", "small"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PIP_CONFIG_FILE": "pip.conf"}
        | {"CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert ("without uv; pip does it" in done.stderr) is not with_uv
    listed = subprocess.run(
        [venv / "bin" / "python", "-c", "import small; print(small.IT_IS)"],
        capture_output=True,
        text=True,
    )
    assert listed.stdout == "installed\n"
    assert not (venv / "bin" / "uv").exists()


def wheel_of_uv(folder: Path) -> None:
    """The installed uv as a wheel again."""
    distribution = metadata.distribution("uv")
    (tag,) = re.findall(r"^Tag: (.*)$", distribution.read_text("WHEEL") or "", re.MULTILINE)[:1]
    with zipfile.ZipFile(folder / f"uv-{distribution.version}-{tag}.whl", "w") as wheel:
        names = []
        for file in distribution.files or ():
            path = Path(str(file.locate())).resolve()
            if "__pycache__" in path.parts or path.name == "RECORD":
                continue
            # programs lie elsewhere in a wheel
            scripts = f"uv-{distribution.version}.data/scripts/{path.name}"
            names.append(scripts if path.parent == UV.parent.resolve() else str(file))
            wheel.write(path, names[-1])
        record = f"uv-{distribution.version}.dist-info/RECORD"
        wheel.writestr(record, "".join(f"{name},,\n" for name in [*names, record]))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied at the end: an environment with torch takes gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="constraints.txt and the images are of Python 3.11"
)
def test_the_install_steps_give_a_working_rlalign(folder: Path) -> None:
    """The images install alike but for the environment's variables, so one is enough; the other's
    steps are compared."""
    assert [s for s in steps("cpu") if s.name != "ENV"] == [
        s for s in steps("gpu") if s.name != "ENV"
    ]
    bin = build("cpu", folder)
    env = pip_environment() | {"PATH": f"{bin}:/usr/bin:/bin", "HOME": str(folder / "home")}

    def inside(*command: str) -> str:
        done = subprocess.run(command, cwd=folder / "home", env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    listed = dict(
        line.split("==") for line in inside(f"{bin}/pip", "freeze", "--all").split() if "==" in line
    )
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    for package in ("ray", "diffusers", "transformers", "pydantic", "numpy"):
        assert listed[package] == pinned[package]
    assert "pytest" not in listed and "ruff" not in listed
    assert "ddpo" in inside("rlalign", "list", "algorithms")
    inside("rlalign", "check", "configs/quickstart.yaml")
    assert pinned["ray"] in inside("ray", "--version")
    place = inside("python", "-c", "import rlalign; print(rlalign.__file__)")
    assert place.startswith(str(folder / "venv")), "installed, not the checkout"
    few = [
        "rounds=1",
        "plan.steps=2",
        "prompts.per_round=2",
        "prompts.samples_per_prompt=2",
        "prompts.per_unit=1",
    ]
    inside(
        "rlalign",
        "train",
        "configs/quickstart.yaml",
        *few,
        "evaluate.prompts=2",
        "--local",
        "--out",
        "runs/one",
    )
    assert (folder / "home/runs/one/report.html").is_file()
