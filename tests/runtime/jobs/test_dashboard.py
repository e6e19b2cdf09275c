"""What the commands ask of a dashboard: directly, with the token, and nobody else sees it."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlalign.cli import main
from rlalign.core.registry import UserError
from rlalign.runtime import cluster
from rlalign.runtime.jobs.dashboard import Dashboard
from rlalign.runtime.jobs.runs import Cluster
from tests.proxies import JOB, Seen, dashboard, name_proxy, proxy, web
from tests.runs import CONFIGS

TOKEN = "5ecret" * 5

COMMANDS: dict[str, list[str]] = {
    "list": ["list", "jobs"],
    "status": ["status", "first"],
    "logs": ["logs", "first"],
    "follow": ["logs", "-f", "first"],
    "submit": ["submit", str(CONFIGS / "quickstart.yaml")],
    "resume": ["submit", "--resume", "/shared/runs/first", "rounds=40"],
    "stop": ["stop", "first"],
    "scale": ["scale", "first", "--rollout=3"],
}


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    # what rlalign sets for Ray's processes ends with the test; here its own client has to see to it
    # alone
    monkeypatch.setattr(cluster, "keep_from_proxies", lambda *_: None)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_asks_through_a_proxy(
    name: str,
    token: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with proxy() as between, web(dashboard) as server:
        name_proxy(monkeypatch, between.url, tmp_path)
        code = main([*COMMANDS[name], "--address", server.url])
        said = capsys.readouterr()
        assert code == 0, said.err
        assert between.asked == []
        assert server.asked
        assert {authorization for _, _, authorization in server.asked} == {f"Bearer {TOKEN}"}
    assert TOKEN not in said.out + said.err
    assert {"follow": "first words\nlast words\n", "status": "2 of 30", "stop": "asked it"}.get(
        name, ""
    ) in said.out


def test_a_submitted_run_names_files_by_absolute_paths(
    token: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the command; an absolute one may be of the cluster's machines alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    submit = ["submit", str(CONFIGS / "quickstart.yaml"), "policy={name: sd3, path: /only/there}"]
    with web(dashboard) as server:
        for file, code in (("none.txt", 2), ("prompts.txt", 0)):
            prompts = f"prompts={{name: file, path: {file}, per_round: 4, per_unit: 1}}"
            assert main([*submit, prompts, "--address", server.url]) == code
        [package] = [body for body in server.bodies if zipfile.is_zipfile(io.BytesIO(body))]
    run = yaml.safe_load(zipfile.ZipFile(io.BytesIO(package)).read("run.yaml"))
    assert run["prompts"]["path"] == str(tmp_path / "prompts.txt")
    assert run["policy"]["path"] == "/only/there"
    assert (
        f"there is nothing at {tmp_path}/none.txt; what only other machines have is"
        in capsys.readouterr().err
    )


def redirecting(to: str) -> Any:
    def app_of(_: Seen) -> Any:
        from aiohttp import web as aio

        async def answer(request: Any) -> Any:
            if request.path in ("/api/jobs/first", "/api/version") and to.endswith("#later"):
                return aio.json_response({"ray_version": "2.60.0", **JOB})
            raise aio.HTTPFound(to.removesuffix("#later") + request.path)

        app = aio.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        return app

    return app_of


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("later", ["", "#later"])
def test_no_redirect_takes_the_token_elsewhere(
    name: str,
    later: str,
    token: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the first request, or at the one that matters."""
    with web(dashboard) as other, web(redirecting(other.url + later)) as server:
        code = main([*COMMANDS[name], "--address", server.url])
        assert all(authorization is None for _, _, authorization in other.asked)
        if not (name == "follow" and later):  # its web socket goes there without the token
            assert (code, other.asked) == (2, [])
            assert "a redirect, and the token goes to no other address" in capsys.readouterr().err


def test_a_token_that_the_server_repeats_is_not_shown(
    token: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def app_of(_: Seen) -> Any:
        from aiohttp import web as aio

        async def answer(request: Any) -> Any:
            if request.path == "/api/version":
                return aio.json_response({"ray_version": "2.60.0"})
            return aio.Response(status=500, text=f"you said {request.headers['Authorization']}")

        app = aio.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        return app

    with web(app_of) as server:
        for name in ("list", "follow", "submit"):
            assert main([*COMMANDS[name], "--address", server.url]) == 2
            said = capsys.readouterr()
            assert "you said Bearer (the token)" in said.err
            assert TOKEN not in said.err + said.out


@pytest.mark.parametrize("text", ["two words", "tökens-are-ascii", "line\nbreak"])
def test_a_token_that_no_header_can_carry_is_refused_unseen(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(text)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(
        UserError, match="a cluster's token is printable ASCII without a space"
    ) as refused:
        Dashboard("http://127.0.0.1:8265")
    assert text not in str(refused.value)


def test_a_password_in_the_address_is_refused_unseen() -> None:
    with pytest.raises(UserError, match="must name no user and no password") as refused:
        Dashboard("http://me:hunter2@127.0.0.1:8265")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("answer", ["<html>hello</html>", json.dumps({"a": 1}), ""])
def test_what_is_no_dashboard_is_named(answer: str) -> None:
    def app_of(_: Seen) -> Any:
        from aiohttp import web as aio

        async def say(_: Any) -> Any:
            return aio.Response(text=answer)

        app = aio.Application()
        app.router.add_route("*", "/{path:.*}", say)
        return app

    with web(app_of) as server:
        with pytest.raises(UserError, match="what answers there is no Ray dashboard"):
            Cluster(server.url).jobs()
