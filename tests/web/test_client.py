"""The one HTTP client: to whom it shows a token, by real proxies and servers that remember what
they saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests

from rlalign.web.client import Client, keep_from_proxies, proxy_of
from tests.certificates import write_certificate
from tests.proxies import Seen, name_proxy, proxy, web
from tests.servers import scripted

TOKEN = "a-token-of-a-test-0123456789"


def plain(_: Seen) -> Any:
    from aiohttp import web as aio

    async def answer(request: Any) -> Any:
        if request.path == "/elsewhere":
            raise aio.HTTPTemporaryRedirect(request.query["to"])
        return aio.json_response([])

    app = aio.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    return app


@pytest.mark.parametrize("method", ["get", "post", "put"])
def test_plain_http_is_asked_directly_with_the_token_alone(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxy() as between, web(plain) as server:
        name_proxy(monkeypatch, between.url, tmp_path)
        answer = getattr(Client(server.url, TOKEN, 30), method)(server.url + "/x")
        assert answer.status_code == 200
        assert server.asked == [(method.upper(), "/x", f"Bearer {TOKEN}")]
        Client(server.url, "", 30).get(server.url)
        assert server.asked[-1][2] is None, "no token is no password of ~/.netrc either"
        assert between.asked == []


def test_no_redirect_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy() as between, web(plain) as server, web(plain) as other:
        name_proxy(monkeypatch, between.url, tmp_path)
        answer = Client(server.url, TOKEN, 30).get(
            server.url + "/elsewhere", params={"to": other.url}
        )
        assert answer.status_code == 307
        assert other.asked == between.asked == []


@pytest.mark.parametrize(
    ("url", "through"),
    [
        ("http://127.0.0.1:8265", None),
        ("http://localhost:8265", None),
        ("http://[::1]:8265", None),
        ("http://10.0.0.5:8265", None),
        ("http://cluster.example.org", None),
        ("https://127.0.0.1:8265", None),
        ("https://localhost", None),
        ("https://[::1]:1", None),
        ("https://cluster.example.org", "proxy"),
        ("https://inside.example.org", None),
    ],
)
def test_which_addresses_are_asked_through_a_proxy(
    url: str, through: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name_proxy(monkeypatch, "http://proxy.example.org:3128", tmp_path)
    monkeypatch.setenv("NO_PROXY", "inside.example.org")
    assert proxy_of(url) == (through and "http://proxy.example.org:3128")


def test_https_to_another_machine_goes_through_the_proxy_which_cannot_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem, key = write_certificate(tmp_path, "DNS:scores.example.org")
    with (
        scripted((200, {}, b""), certificate=(pem, key)) as server,
        proxy(target=server.port) as between,
    ):
        name_proxy(monkeypatch, between.url, tmp_path)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(pem))
        with Client("https://scores.example.org", TOKEN, 30) as client:
            assert client.get("https://scores.example.org/score").status_code == 200
        assert [(how, where) for how, where, _ in between.asked] == [
            ("CONNECT", "scores.example.org:443")
        ]
        assert between.asked[0][2] is None
        assert TOKEN.encode() not in between.carried and len(between.carried) > 1000
    assert [headers["Authorization"] for headers, _ in server.sent] == [f"Bearer {TOKEN}"]


def test_other_clients_are_kept_from_the_proxy_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the environment, which Ray's processes inherit; what the user has excepted stays."""
    with proxy() as between, web(plain) as server:
        name_proxy(monkeypatch, between.url, tmp_path)
        monkeypatch.setenv("no_proxy", "one.example.org, localhost")
        monkeypatch.setenv("NO_PROXY", "two.example.org")
        assert requests.get(server.url).status_code == 503
        keep_from_proxies("10.0.0.5")
        assert requests.get(server.url).status_code == 200
        assert len(between.asked) == 1
    import os

    expected = "one.example.org,localhost,two.example.org,127.0.0.1,::1,10.0.0.5"
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == expected
    keep_from_proxies("10.0.0.5")
    assert os.environ["no_proxy"] == expected
