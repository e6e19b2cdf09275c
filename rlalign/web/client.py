"""HTTP with a token, as a client: what every request of rlalign goes through.

A token that is not encrypted is shown to nobody but the server that it is for. So loopback and
plain http are asked directly, whatever proxies the environment names (``http_proxy``, ``ALL_PROXY``
...); https to another machine goes through them as elsewhere, because a proxy of https carries what
it cannot read. No redirect is followed, and ~/.netrc is not read, whose passwords would take the
token's place.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase
from requests.utils import get_environ_proxies, select_proxy

from rlalign.web.token import is_loopback

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""What NO_PROXY names, so that clients that are not ours ask it directly too."""


class Bearer(AuthBase):
    """Puts a token into a request's header; "" puts none."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class Client(requests.Session):
    """A session with one server, at the scheme, host and port of ``url``.

    Of the environment it takes the proxies of https to another machine, and whose certificates to
    trust (``REQUESTS_CA_BUNDLE``, ``CURL_CA_BUNDLE``).
    """

    def __init__(self, url: str, token: str, timeout_seconds: float) -> None:
        super().__init__()
        self.trust_env = False
        self.auth = Bearer(token)
        self.headers["User-Agent"] = "rlalign"
        self.verify = (
            os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        )
        self.proxies = _proxies(url)
        self._timeout_seconds = timeout_seconds

    def request(  # type: ignore[override]
        self, method: str, url: str, **settings: Any
    ) -> requests.Response:
        """A request that follows no redirect; ``timeout`` and the rest are requests' own."""
        return super().request(
            method, url, **{"timeout": self._timeout_seconds, **settings, "allow_redirects": False}
        )


def proxy_of(url: str) -> str | None:
    """The proxy through which a request to ``url`` goes, None for none."""
    return select_proxy(url, _proxies(url))


def _proxies(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    if parts.scheme not in ("https", "wss") or is_loopback(parts.hostname or ""):
        return {}
    return get_environ_proxies(url)


def keep_from_proxies(*hosts: str) -> None:
    """Has every client of this process, and of those that it starts, ask loopback and ``hosts``
    directly.

    Ray's processes ask its dashboard over plain http, with the token, by clients that follow the
    environment's proxies.
    """
    named = [os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    known = [host.strip() for host in ",".join(named).split(",")]
    value = ",".join(dict.fromkeys(host for host in (*known, *LOOPBACK, *hosts) if host))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = value
