"""Runs as Ray jobs: what is packed, what a log says, and on a real head with a token the whole life
of one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlalign.alignment import control
from rlalign.alignment.loop import train_local
from rlalign.core.registry import UserError
from rlalign.runtime.jobs.pack import pack, plugin_modules
from rlalign.runtime.jobs.runs import Cluster
from tests.heads import rlalign, start_head
from tests.runs import CONFIGS, SMALL, assert_same_run, small_run

JOB = {"submission_id": "first", "driver_node_id": "abc"}
STATUS_PATH = "/api/v0/logs/file?node_id=abc&filename=rlalign-first.json&lines=10"


def test_a_job_stands_as_its_own_status_says(dashboard: Any) -> None:
    status = {"job": "first", "state": "running", "round": 2, "pools": {}}
    dashboard.answers[STATUS_PATH] = (200, json.dumps(status))
    assert Cluster(url(dashboard)).standing(JOB) == status
    assert [path for path, _ in dashboard.asked] == [STATUS_PATH]


@pytest.mark.parametrize(
    "answer",
    [
        (500, "A file is not found at: /tmp/ray/session/logs/rlalign-first.json"),
        (404, ""),
        (200, '{"job": "second", "round": 9}'),
        (200, '{"job": "fir'),
    ],
)
def test_a_job_without_a_status_of_its_own_says_nothing(
    dashboard: Any, answer: tuple[int, str]
) -> None:
    """It has only just started, or a later job goes on with its run folder."""
    dashboard.answers[STATUS_PATH] = answer
    assert Cluster(url(dashboard)).standing(JOB) == {}
    assert Cluster(url(dashboard)).standing({**JOB, "driver_node_id": None}) == {}
    assert len(dashboard.asked) == 1


def test_only_plug_ins_of_ones_own_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, target = tmp_path / "home", tmp_path / "target"
    (home / "lab" / "inner").mkdir(parents=True)
    target.mkdir()
    (home / "lab" / "__init__.py").write_text("")
    (home / "lab" / "inner" / "__init__.py").write_text(
        "import numpy\nfrom neighbour import THING\n"
    )
    (home / "neighbour.py").write_text("import json\nTHING = 1\n", encoding="utf-8-sig")
    (home / "stranger.py").write_text("")
    (home / "secret.txt").write_text("not for the cluster")
    monkeypatch.syspath_prepend(str(home))
    settings = {
        "policy": {"name": "tiny"},
        "rewards": [
            {"name": "lab.inner:Sharp"},
            {"name": "function", "call": "math:sqrt"},
            {"call": "torch:abs"},
        ],
        "url": "http://somewhere:80/x",
    }
    assert plugin_modules(settings) == ["lab.inner", "math", "torch"]
    packed = pack("name: x\n", settings, target)
    assert packed == ["lab/__init__.py", "lab/inner/__init__.py", "neighbour.py", "run.yaml"]


def test_a_plug_in_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no module no_such_lab"):
        pack("", {"call": "no_such_lab.rewards:score"}, tmp_path)


class _Dashboard(BaseHTTPRequestHandler):
    """Answers what its server's ``answers`` says, and remembers what it was asked."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))  # type: ignore[attr-defined]
        code, body = self.server.answers.get(self.path, (404, "{}"))  # type: ignore[attr-defined]
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def dashboard() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Dashboard)
    server.answers, server.asked = {}, []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def url(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_the_token_travels_in_the_header_and_nowhere_else(
    dashboard: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    dashboard.answers["/api/jobs/"] = (200, "[]")
    assert Cluster(url(dashboard)).jobs() == []
    (tmp_path / "token").write_text("s3cret\n", encoding="utf-8-sig")
    assert Cluster(url(dashboard)).jobs() == []
    assert dashboard.asked == [("/api/jobs/", "Bearer s3cret")] * 2
    (tmp_path / "token").write_text("s3cret\n", encoding="utf-16")
    with pytest.raises(UserError, match="token: a cluster's token is printable ASCII"):
        Cluster(url(dashboard)).jobs()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, "no"), "refuses this token; name the cluster's in RAY_AUTH_TOKEN_PATH"),
        ((500, "it broke"), "answered 500: it broke"),
    ],
)
def test_what_the_dashboard_refuses_is_said(
    dashboard: Any, answer: tuple[int, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    dashboard.answers["/api/jobs/"] = answer
    with pytest.raises(UserError, match=message):
        Cluster(url(dashboard)).jobs()


def test_an_unknown_job_names_the_nearest(dashboard: Any) -> None:
    known = [
        {
            "submission_id": "quickstart-1",
            "metadata": {"rlalign": "0.1"},
            "start_time": 1,
            "status": "RUNNING",
        }
    ]
    dashboard.answers["/api/jobs/"] = (200, json.dumps(known))
    with pytest.raises(
        UserError, match="there is no job 'quickstart-2' at .*; did you mean 'quickstart-1'"
    ):
        Cluster(url(dashboard)).job("quickstart-2")


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://x:1", "nonsense", "http://"])
def test_an_address_must_be_the_dashboards_url(address: str) -> None:
    with pytest.raises(UserError, match="must be the URL of the cluster's dashboard"):
        Cluster(address)


def test_nobody_answers() -> None:
    with pytest.raises(UserError, match="no Ray dashboard answers there"):
        Cluster("http://127.0.0.1:1").jobs()


# --- a real head ---------------------------------------------------------------------------------


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str], str]]:
    """(dashboard URL, environment with its token file, token) of a head that listens on loopback
    only."""
    with start_head(tmp_path, {}) as one:
        yield one.address, one.environment, one.token


@pytest.mark.ray
@pytest.mark.slow
def test_the_life_of_a_job(
    head: tuple[str, dict[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, environment, token = head
    there = f"--address={address}"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_reward.py").write_text(
        "def score(media, prompts):\n    return [float(m.mean()) for m in media]\n"
    )
    rewards = "rewards=[{name: function, call: 'my_reward:score', label: mine}]"
    settings = [*SMALL, rewards, "rounds=1000"]
    folder = tmp_path / "run"
    environment = {**environment, "PYTHONPATH": str(tmp_path / "mine")}
    arguments = [
        str(CONFIGS / "quickstart.yaml"),
        *settings,
        there,
        "--out",
        str(folder),
        "--id",
        "life",
    ]
    done = rlalign(environment, "submit", *arguments)
    assert done.returncode == 0, done.stderr
    assert "with my_reward.py, run.yaml" in done.stdout
    assert f"run folder there: {folder}" in done.stdout

    def until(text: str) -> str:
        while True:
            said = rlalign(environment, "status", "life", there).stdout
            if re.search(text, said):
                return said
            assert not re.search(r"life: (failed|stopped)", said), (
                said + rlalign(environment, "logs", "life", there).stdout
            )
            time.sleep(0.5)

    said = until(r"round +\d+ of 1000")
    assert "time left" in said
    assert re.search(r"rollout workers +2 ready of 2", said)
    done = rlalign(environment, "scale", "life", "--rollout=3", there)
    assert done.returncode == 0, done.stderr
    assert f"asked {folder} for 3 rollout workers" in done.stdout
    until(r"rollout workers +3 ready of 3")
    here = rlalign(environment, "status", str(folder)).stdout
    assert "running, job life" in here
    assert "rollout workers" in here
    assert "life" in rlalign(environment, "list", "jobs", there).stdout

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", environment["RAY_AUTH_TOKEN_PATH"])
    spans = {
        span["name"] for span in Cluster(address).ask("/api/v0/tasks/timeline")
    }  # the dashboard's own
    assert [span for span in spans if re.fullmatch(r"train/\d+/\d+ under current v\d+", span)]
    assert [span for span in spans if re.fullmatch(r"mine of train/\d+/\d+", span)]

    stranger = {**environment, "RAY_AUTH_TOKEN_PATH": "/nowhere"}
    for command in (("status", "life"), ("list", "jobs"), ("stop", "life"), ("logs", "life")):
        refused = rlalign(stranger, *command, there)
        assert refused.returncode == 2
        assert "refuses a request without a token" in refused.stderr
    processes = subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout
    assert token not in processes

    done = rlalign(environment, "stop", "life", there)
    assert done.returncode == 0, done.stderr
    assert f"{folder}: stopped after round" in done.stdout
    until("life: succeeded")
    assert (
        "go on with: rlalign train --resume"
        in rlalign(environment, "logs", "-f", "life", there).stdout
    )
    rounds = control.status_of(folder)["round"]
    for path in folder.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes()

    done = rlalign(
        environment,
        "submit",
        "--resume",
        str(folder),
        f"rounds={rounds + 1}",
        there,
        "--id",
        "more",
    )
    assert done.returncode == 0, done.stderr
    while (
        "more: running" in (said := rlalign(environment, "status", "more", there).stdout)
        or "pending" in said
    ):
        time.sleep(0.5)
    assert "more: failed" in said, "its plug-in was not sent"
    mine = ["--resume", str(folder), f"rounds={rounds + 1}", str(tmp_path / "plain.yaml")]
    (tmp_path / "plain.yaml").write_text((folder / "config.yaml").read_text())
    done = rlalign(environment, "submit", *mine, there, "--id", "yet-more")
    assert done.returncode == 0, done.stderr
    while (
        "yet-more: running" in (said := rlalign(environment, "status", "yet-more", there).stdout)
        or "pending" in said
    ):
        time.sleep(0.5)
    assert "yet-more: succeeded" in said

    # what the cluster made in three jobs is what one process would have made alone
    sys.path.insert(0, str(tmp_path / "mine"))
    run = small_run(rewards, f"rounds={rounds + 1}")
    train_local(run, tmp_path / "alone", resume=False, on_record=lambda _: None)
    sys.path.remove(str(tmp_path / "mine"))
    assert_same_run(folder, tmp_path / "alone")


CHATTY = """
import time
line = "x" * 999 + chr(10)
for _ in range(100):
    print(line * 1000, end="")
for number in range(60):
    print("beat", number, flush=True)
    time.sleep(0.5)
"""

ROUND_41 = """
import ray
from pathlib import Path
from rlalign.alignment.control import Status
from rlalign.runtime.jobs.publish import job_id, publish_status

ray.init(address="auto", logging_level="ERROR")
publish_status(Path.cwd(), job_id())
status = Status(Path.cwd(), 100, name="chatty", job=job_id())
status.record({"round": 41, "staleness/max": 0, "seconds/round": 10.0})
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_printed_a_hundred_megabytes(
    head: tuple[str, dict[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long it and the whole log take is printed (a second at most is wanted of the status)."""
    address, environment, _ = head
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", environment["RAY_AUTH_TOKEN_PATH"])
    cluster = Cluster(address)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "chatty.py").write_text(ROUND_41 + CHATTY)
    cluster.submit(
        "python chatty.py", {"rlalign": "0", "folder": "/x"}, name="chatty", folder=tmp_path / "job"
    )
    while "beat 0" not in cluster.logs("chatty") or not cluster.standing(cluster.job("chatty")):
        time.sleep(0.5)

    def took() -> float:
        start = time.monotonic()
        done = rlalign(environment, "status", "chatty", f"--address={address}")
        assert "41 of 100" in done.stdout, done.stderr
        return time.monotonic() - start

    seconds = sorted(took() for _ in range(3))
    start = time.monotonic()
    assert len(cluster.logs("chatty")) > 100_000_000
    print(
        f"status {seconds[0]:.2f} to {seconds[-1]:.2f} s; all of the log"
        f" {time.monotonic() - start:.2f} s"
    )


@pytest.mark.ray
@pytest.mark.slow
def test_logs_are_followed_as_they_come(
    head: tuple[str, dict[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, environment, _ = head
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", environment["RAY_AUTH_TOKEN_PATH"])
    cluster, pieces = Cluster(address), list[tuple[float, str]]()
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "beats.py").write_text(
        CHATTY.replace("range(100)", "range(0)").replace("range(60)", "range(12)")
    )
    cluster.submit(
        "python beats.py", {"rlalign": "0", "folder": "/x"}, name="beats", folder=tmp_path / "job"
    )
    cluster.follow("beats", lambda piece: pieces.append((time.monotonic(), piece)))
    text = "".join(piece for _, piece in pieces)
    assert text == cluster.logs("beats")
    assert [f"beat {n}" for n in range(12)] == [
        line for line in text.splitlines() if line.startswith("beat")
    ]
    beats = [at for at, piece in pieces if "beat" in piece]
    assert beats[-1] - beats[0] > 3, "all of it came at the end"
