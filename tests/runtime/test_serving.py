"""``rlalign serve-reward``: the command as users start it, with Ray Serve behind it."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlalign.cli import main
from rlalign.core.registry import build
from rlalign.networks import devices
from rlalign.rewards.base import score
from rlalign.web.protocol import requests_of
from rlalign.web.token import TOKEN_ENV

pytestmark = pytest.mark.ray
TOKEN = "a-token-of-a-test-0123456789"


class Command:
    """A running ``rlalign serve-reward`` on a free port, with what it prints and its processes."""

    def __init__(self, folder: Path, *arguments: str, code: str = "") -> None:
        (folder / "given.py").write_text(code)
        self.output = folder / "output.txt"
        environment = {
            **os.environ,
            TOKEN_ENV: TOKEN,
            "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        }
        command = [sys.executable, "-m", "rlalign", "serve-reward", *arguments, "--port", "0"]
        with self.output.open("w") as out:
            self.process = psutil.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment
            )
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.output.read_text())):
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)
        self.url, self.port = found.group(0), int(found.group(1))

    def family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def replica(self) -> psutil.Process | None:
        found = [p for p in self.family() if "ServeReplica" in "".join(p.cmdline())]
        return found[0] if found else None

    def session(self) -> Path:
        """The folder of its Ray's logs."""
        raylet = next(p for p in self.family() if p.name() == "raylet")
        return Path(
            next(
                re.findall(r"--session_dir=(\S+)", a)[0]
                for a in raylet.cmdline()
                if "--session_dir=" in a
            )
        )

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(600)

    def ask(
        self, body: bytes, method: str = "POST", path: str = "/score", **headers: str
    ) -> tuple[int, bytes]:
        """(status, body) of any request; headers replace the right ones, "" leaves one out."""
        known = {
            "Authorization": f"Bearer {TOKEN}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }
        known |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in known.items():
                if value:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def serves(self) -> bool:
        """It answers, and scores what is right."""
        return self.ask(b"", "GET", "/health")[0] == 200 and self.ask(right())[0] == 200


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    served = Command(tmp_path_factory.mktemp("serve"), "jpeg", "quality=90")
    yield served
    assert served.end() == 0
    assert served.output.read_text().count("\n") == 1, "it ends without a word"


def pictures(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 1, 3, 16, 16), dtype=np.uint8)


def right() -> bytes:
    return next(iter(requests_of(pictures(), ["a", "b", "c"], 3)))[1]


def client(command: Command, **changes):
    return build("rewards", {"name": "http", "url": command.url, **changes})


@pytest.mark.promise
def test_it_says_in_one_line_where_it_listens_and_what_it_serves(command):
    said = command.output.read_text()
    expected = (
        rf"serving reward jpeg at {command.url} \(1 replica\); the token is in {TOKEN_ENV}; Ctrl-C"
        r" ends it\n"
    )
    assert re.fullmatch(expected, said)


@pytest.mark.promise
def test_scores_are_bitwise_those_of_the_reward_itself(command, monkeypatch):
    monkeypatch.setenv(TOKEN_ENV, TOKEN)
    here, there = build("rewards", {"name": "jpeg", "quality": 90}), client(command, batch=8)
    media, prompts = pictures(20), ["a"] * 20
    expected = score(here, here.load("cpu"), media, prompts)
    np.testing.assert_array_equal(score(there, there.load("cpu"), media, prompts), expected)


@pytest.mark.promise
def test_without_the_token_every_path_is_refused(command):
    for path in ("/score", "/health", "/", "/-/routes", "/-/healthz", "/docs"):
        for method in ("GET", "POST", "PUT", "OPTIONS"):
            for authorization in ("", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN):
                status, body = command.ask(b"{}", method, path, Authorization=authorization)
                assert status == 401
                assert set(json.loads(body)) == {"error"}


@pytest.mark.promise
def test_nothing_listens_but_on_loopback(command):
    """Not the server, nor Ray, nor the port that every replica of Ray Serve opens for calls over
    gRPC."""
    found = {}
    for process in command.family():
        for one in process.net_connections(kind="inet"):
            if one.status == psutil.CONN_LISTEN:
                found[one.laddr.ip, one.laddr.port] = process.name()
    assert command.port in {port for _, port in found}
    assert any("ServeReplica" in name for name in found.values())
    public = {
        at: name
        for at, name in found.items()
        if at[0].removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    }
    assert public == {}


@pytest.mark.promise
def test_the_token_is_in_no_command_line_no_log_and_no_child(command):
    command.serves()
    for process in command.family():
        assert TOKEN not in " ".join(process.cmdline())
    for process in command.process.children(recursive=True):
        assert TOKEN not in " ".join(process.environ().values()), process.name()
    files = [f for f in command.session().resolve().rglob("*") if f.is_file()]
    assert any("serve" in f.name for f in files), "Ray Serve has written its logs"
    assert [f for f in [*files, command.output] if TOKEN.encode() in f.read_bytes()] == []


@pytest.mark.promise
@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (404, {"path": "/scores"}),
        (405, {"method": "GET"}),
        (405, {"path": "/health"}),
        (411, {"Content_Length": ""}),
        (413, {"Content_Length": str(2**26 + 1)}),
        (413, {"Content_Length": "9" * 18}),
        (415, {"Content_Type": "application/x-python-pickle"}),
        (415, {"Content_Type": ""}),
        (415, {"Content_Encoding": "gzip"}),
        (400, {"body": b"\x80\x04K\x01."}),
        (400, {"Content_Length": "-1"}),
        (400, {"path": "/score bad"}),
    ],
)
def test_each_kind_of_wrong_request_has_its_status(command, status, request_):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(http.client.HTTPConnection, "_validate_path", lambda *_: None)
        assert command.ask(**{"body": right(), **request_})[0] == status
    assert command.serves()


# What a body may hold in place of what belongs there.
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=40).map(str),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@st.composite
def malformed(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    """(body, headers): bytes, JSON of another shape, one field replaced, a damaged picture, or a
    wrong header."""
    kind = draw(st.sampled_from(["bytes", "json", "field", "picture", "cut", "header"]))
    whole = json.loads(right())
    headers: dict[str, str] = {}
    if kind == "bytes":
        return draw(st.binary(max_size=400)), headers
    if kind == "json":
        return json.dumps(draw(ODD)).encode(), headers
    if kind == "field":
        odd = draw(
            ODD.filter(lambda v: not (isinstance(v, list) and len(v) == 3))
        )  # three texts would be right
        whole[draw(st.sampled_from(["prompts", "media", "more"]))] = odd
    elif kind == "picture":
        file = bytearray(base64.b64decode(whole["media"][1][0]))
        at = draw(st.integers(0, 28))  # signature and header, where every byte counts
        file[at] ^= draw(st.integers(1, 255))
        whole["media"][1] = [base64.b64encode(bytes(file)).decode()]
    elif kind == "cut":
        return right()[: draw(st.integers(0, len(right()) - 1))], headers
    else:
        visible = st.text(
            st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40
        )
        name = draw(st.sampled_from(["Authorization", "Content-Type", "Content-Encoding"]))
        headers[name.replace("-", "_")] = draw(visible)
    return json.dumps(whole).encode(), headers


def refuses(command: Command, request_: tuple[bytes, dict[str, str]]) -> None:
    body, headers = request_
    status, said = command.ask(body, **headers)
    assert 400 <= status < 500, (status, said)
    assert b"Traceback" not in said and b".py" not in said
    assert set(json.loads(said)) == {"error"}


QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.promise
@settings(max_examples=150, derandomize=True, **QUIET)
@given(malformed())
def test_malformed_requests_are_refused_in_one_sentence(command, request_):
    refuses(command, request_)


@pytest.mark.slow
def test_a_thousand_malformed_requests_leave_it_as_it_was(command):
    """No crash, no hang, no traceback; the same process scores afterwards."""
    replica, seen = command.replica(), []

    @settings(max_examples=1000, **QUIET)
    @given(malformed())
    def each(request_):
        seen.append(request_)
        refuses(command, request_)

    each()
    assert len(seen) >= 1000
    assert command.serves()
    assert command.replica() == replica
    assert "Traceback" not in command.output.read_text()


@pytest.mark.promise
@settings(max_examples=50, derandomize=True, **QUIET)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_http_at_all_do_no_harm(command, noise):
    with socket.create_connection(("127.0.0.1", command.port)) as line:
        line.sendall(noise + b"\r\n\r\n")
        line.shutdown(socket.SHUT_WR)
        said = b""
        while piece := line.recv(65536):
            said += piece
    assert said == b"" or re.match(rb"HTTP/1\.1 4\d\d ", said)
    assert b"Traceback" not in said


@pytest.mark.promise
def test_it_still_serves_after_all_that(command):
    assert command.serves()


@pytest.mark.slow
def test_a_replica_that_dies_is_replaced_while_the_client_waits(tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_ENV, TOKEN)
    served = Command(tmp_path, "jpeg")
    reward = client(served)
    scorer = reward.load("cpu")
    before = score(reward, scorer, pictures(), ["a"] * 3)
    dead = served.replica()
    assert dead is not None
    dead.kill()
    np.testing.assert_array_equal(score(reward, scorer, pictures(), ["a"] * 3), before)
    assert served.end() == 0


HANGS_ONCE = """
import pathlib, time
def scores(media, prompts, marker):
    mark = pathlib.Path(marker)
    if not mark.exists():
        mark.touch()
        time.sleep(3600)
    return [1.0] * len(prompts)
"""


@pytest.mark.slow
def test_a_reward_that_hangs_is_replaced_while_the_client_waits(tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_ENV, TOKEN)
    given_ = (
        "function",
        "call=given:scores",
        f"arguments.marker={tmp_path / 'marker'}",
        "server.timeout_seconds=10",
    )
    served = Command(tmp_path, *given_, code=HANGS_ONCE)
    reward = client(served)
    assert score(reward, reward.load("cpu"), pictures(), ["a"] * 3).tolist() == [1.0] * 3
    assert served.end() == 0


@pytest.mark.slow
def test_it_refuses_a_cluster_where_ray_serve_is_in_use(ray_cluster, tmp_path, monkeypatch, capsys):
    from ray import serve

    serve.start(proxy_location="Disabled")
    serve.run(serve.deployment(Other).bind(), name="others", route_prefix=None)
    monkeypatch.setenv(TOKEN_ENV, TOKEN)
    monkeypatch.setattr("rlalign.runtime.serving._end", lambda address: serve.shutdown())
    assert main(["serve-reward", "jpeg", "--port", "0"]) == 2
    assert (
        "the cluster already serves others with Ray Serve; end that first"
        in capsys.readouterr().err
    )


class Other:
    def __call__(self):
        return "here"


# --- what is refused before anything starts ------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jpgg"], "reward.name: no plug-in 'jpgg' on shelf rewards; did you mean 'jpeg'?"),
        (["jpeg", "quality=0"], "reward.quality must be >= 1, got 0"),
        (["jpeg", "server.devce=cpu"], "devce: unknown setting; did you mean 'device'?"),
        (["jpeg", "server.host=0.0.0.0"], "server.host has an option of its own"),
        (["jpeg", "server=5"], "server must be a mapping"),
        (["jpeg", "--replicas", "0"], "replicas must be >= 1, got 0"),
        (
            ["jpeg", "--no-token", "--host", "0.0.0.0"],
            "--no-token is for a loopback address, got --host 0.0.0.0",
        ),
        (["jpeg", "server.certificate=a.pem"], "server.certificate and server.key go together"),
        (["jpeg", "server.certificate=a.pem", "server.key=b.pem"], "No such file"),
        (
            ["jpeg", "--host", "192.0.2.1", "--port", "0"],
            "--host 192.0.2.1 --port 0: cannot listen there",
        ),
        (
            ["jpeg", "server.device=cuda"],
            "server.gpus must be > 0 where server.device is cuda, got 0",
        ),
        (
            ["jpeg", "server.device=cuda:1", "server.gpus=1"],
            "server.device must be cpu or cuda, got cuda:1",
        ),
        (
            ["jpeg", "server.gpus=1.5"],
            "server.gpus must be a share of one GPU or a whole number of them, got 1.5",
        ),
        (
            ["jpeg", "server.gpus=0.5", "--port", "0"],
            "1 replicas, of 1 CPU, 0.5 GPU each, find no place on this machine",
        ),
    ],
)
def test_a_mistake_is_one_message(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv(TOKEN_ENV, TOKEN)
    monkeypatch.setattr(devices, "gpus", lambda: 0)
    assert main(["serve-reward", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert message in said
    assert TOKEN not in said


def test_a_server_needs_a_token_or_a_word_that_it_has_none(monkeypatch, capsys):
    monkeypatch.delenv(TOKEN_ENV, raising=False)
    assert main(["serve-reward", "jpeg"]) == 2
    assert f"the environment variable {TOKEN_ENV} must hold the token" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_before_ray_starts(monkeypatch, capsys):
    monkeypatch.setenv(TOKEN_ENV, TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve-reward", "jpeg", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen there (Address already in use)" in capsys.readouterr().err
