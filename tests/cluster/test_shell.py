"""The shell scripts without a Ray: they parse, they help, and they refuse what is wrong before
anything starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.servers import scripted

CLUSTER = Path(__file__).parents[2] / "cluster"

SCRIPTS = ("start-head.sh", "start-worker.sh", "slurm.sbatch", "ray-env.sh", "spot-notice.sh")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(
            ["shellcheck", "--external-sources", CLUSTER / name], check=True, cwd=CLUSTER
        )
    if name != "ray-env.sh":
        assert "set -euo pipefail" in (CLUSTER / name).read_text()
    assert name in ("ray-env.sh", "slurm.sbatch") or os.access(CLUSTER / name, os.X_OK)


def script(name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", CLUSTER / name, *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def test_help_is_the_scripts_own_comment() -> None:
    for name in ("start-head.sh", "start-worker.sh"):
        told = script(name, "--help")
        assert told.returncode == 0
        assert "--node-ip" in told.stdout or "--role" in told.stdout
        assert "set -" not in told.stdout and "#" not in told.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--role", "rollout"], "--head must be HOST:PORT, got ''"),
        (
            ["--head", "10.0.0.5:6379", "--role", "cook"],
            "--role must be rollout, reward or learner, got 'cook'",
        ),
        (
            ["--head", "10.0.0.5:6379", "--role", "reward", "--places", "0"],
            "--places must be a whole number >= 1, got '0'",
        ),
        (
            ["--head", "127.0.0.1:6379", "--role", "reward"],
            "is a loopback address, which no worker can join",
        ),
        (["--hea", "10.0.0.5:6379"], "unknown argument --hea"),
    ],
)
def test_workers_refuse_mistakes(tmp_path: Path, arguments: list[str], message: str) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    refused = script("start-worker.sh", *arguments, RAY_AUTH_TOKEN_PATH=str(token))
    assert refused.returncode == 2
    assert message in refused.stderr


@pytest.mark.parametrize(
    ("cloud", "answers", "seconds"),
    [
        ("aws", [(200, "session"), (404, ""), (200, "session"), (200, '{"action": "stop"}')], 115),
        ("gcp", [(200, "TRUE")], 25),
        ("azure", [(200, '{"Events": [{"EventType": "Preempt"}]}')], 25),
    ],
)
def test_a_clouds_notice_is_told_to_ray(
    tmp_path: Path, cloud: str, answers: list[tuple[int, str]], seconds: int
) -> None:
    """The cloud's metadata and ``ray`` are stood in for."""
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\necho "$@"\n')
    ray.chmod(0o755)
    with scripted(*((code, {}, text.encode()) for code, text in answers)) as metadata:
        told = script(
            "spot-notice.sh",
            *("--cloud", cloud, "--address", "10.0.0.5:6379"),
            RLALIGN_METADATA=metadata.url,
            PATH=f"{tmp_path}:{os.environ['PATH']}",
        )
    assert told.returncode == 0, told.stderr
    assert len(metadata.sent) == len(answers)
    assert told.stdout.startswith("drain-node --address 10.0.0.5:6379 --reason DRAIN_NODE_REASON_P")
    assert told.stdout.endswith(f"--deadline-remaining-seconds {seconds}\n")


def test_a_cloud_that_is_not_known_is_refused() -> None:
    refused = script("spot-notice.sh", "--cloud", "mist")
    assert refused.returncode == 2 and "must be aws, gcp or azure, got 'mist'" in refused.stderr


def test_a_worker_without_the_token_or_with_an_open_one_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    arguments = ("--head", "10.0.0.5:6379", "--role", "rollout")
    refused = script("start-worker.sh", *arguments, RAY_AUTH_TOKEN_PATH=str(token))
    assert refused.returncode == 2 and "no token at" in refused.stderr
    token.write_text("secret")
    token.chmod(0o644)
    refused = script("start-worker.sh", *arguments, RAY_AUTH_TOKEN_PATH=str(token))
    assert refused.returncode == 2 and "must have mode 0600 or 0400, got 0644" in refused.stderr


def test_a_new_token_is_random_and_its_owners_alone(tmp_path: Path) -> None:
    tokens = []
    for name in ("one", "two"):
        path = tmp_path / name / "token"
        script = (
            f"source {CLUSTER}/ray-env.sh;"
            " rlalign_new_token; rlalign_new_token; rlalign_require_token"
        )
        made = subprocess.run(
            ["bash", "-euc", script],
            env={**os.environ, "RAY_AUTH_TOKEN_PATH": str(path)}, capture_output=True, text=True,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        assert path.stat().st_mode & 0o777 == 0o600
        tokens.append(path.read_text())
        assert re.fullmatch(r"[0-9a-f]{64}", tokens[-1])
        assert tokens[-1] not in made.stdout + made.stderr
    assert tokens[0] != tokens[1]


def test_cpus_are_counted_whatever_openmp_is_told() -> None:
    counted = subprocess.run(
        ["bash", "-euc", f"source {CLUSTER}/ray-env.sh; rlalign_cpus"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(counted.stdout) == len(os.sched_getaffinity(0))


def sourced(names: str, **environment: str) -> list[str]:
    """The values of variables after ray-env.sh."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k.lower() != "no_proxy" and k not in ("TMPDIR", "RAY_TMPDIR")
    }
    script = f'source {CLUSTER}/ray-env.sh; for name in {names}; do echo "${{!name:-}}"; done'
    told = subprocess.run(
        ["bash", "-euc", script],
        env={**clean, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return told.stdout.splitlines()


def test_rays_own_clients_ask_loopback_past_any_proxy() -> None:
    own = "".join(
        f",{one}"
        for one in subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    )
    assert sourced("no_proxy NO_PROXY") == [f"localhost,127.0.0.1,::1{own}"] * 2
    assert (
        sourced("no_proxy NO_PROXY", NO_PROXY="a.b", no_proxy="c.d")
        == [f"c.d,a.b,localhost,127.0.0.1,::1{own}"] * 2
    )


def test_a_jobs_long_tmpdir_leaves_room_for_sockets() -> None:
    assert sourced("RAY_TMPDIR TMPDIR") == ["", ""]
    assert sourced("RAY_TMPDIR TMPDIR", TMPDIR="/scratch/7") == ["", "/scratch/7"]
    long = "/scratch/slurm_jobdir_of_a_long_name/1355700"
    assert sourced("RAY_TMPDIR TMPDIR", TMPDIR=long) == [f"/tmp/rlalign-{os.getuid()}"] * 2
    assert sourced("RAY_TMPDIR TMPDIR", TMPDIR=long, RAY_TMPDIR="/scratch/7") == [
        "/scratch/7",
        long,
    ]
