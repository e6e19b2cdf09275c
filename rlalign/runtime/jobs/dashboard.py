"""What a cluster's dashboard is asked over HTTP. The token travels in a header, and to the
dashboard only.

Every request, Ray's own client's too, goes through rlalign.web.client.
"""

from __future__ import annotations

import json
import logging
import os
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlalign.core.registry import UserError
from rlalign.runtime.token import cluster_token
from rlalign.web.client import Client, proxy_of

if TYPE_CHECKING:
    import requests
    from ray.job_submission import JobSubmissionClient

TIMEOUT_SECONDS = 10.0


class Dashboard:
    """A cluster's dashboard, by its URL."""

    def __init__(self, address: str) -> None:
        self.address = (
            address or os.environ.get("RAY_API_SERVER_ADDRESS", "") or "http://127.0.0.1:8265"
        ).rstrip("/")

        # a password would show in the list of processes
        if "@" in self.address:
            raise UserError(
                "--address must name no user and no password: a command line is read by everybody"
            )

        # only a whole URL of http or https is taken
        try:
            parts = urlsplit(self.address)
            is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_url = False
        if not is_url:
            raise UserError(
                "--address must be the URL of the cluster's dashboard, as http://127.0.0.1:8265,"
                f" got {self.address!r}"
            )
        self._token = cluster_token()
        self._client = Client(self.address, self._token, TIMEOUT_SECONDS)

    def ask(self, path: str) -> Any:
        """The JSON that the dashboard answers. Raises UserError where it refuses or does not
        answer; KeyError for a 404."""
        try:
            return json.loads(self.read(path))
        except json.JSONDecodeError as error:
            raise UserError(
                f"--address {self.address}: what answers there is no Ray dashboard"
            ) from error

    def read(self, path: str, absent: Sequence[int] = (404,)) -> str:
        """The text that the dashboard answers, as ``ask``; KeyError for a status of ``absent``."""
        import requests

        try:
            answer = self._client.get(self.address + path)
        except requests.RequestException as error:
            raise UserError(
                f"--address {self.address}: no Ray dashboard answers there"
                f" ({type(error).__name__}); is the cluster up, and its dashboard's port forwarded?"
            ) from error

        # a status says what is wrong: a stranger, nothing there, or a failure
        self._refuse_stranger(answer)
        if answer.status_code in absent:
            raise KeyError(path)
        if answer.status_code != 200:
            raise UserError(
                f"--address {self.address}{path} answered {answer.status_code}:"
                f" {self.quote(answer.text)}"
            )

        # requests would read text without a charset as Latin-1
        answer.encoding = (
            answer.encoding if "charset" in answer.headers.get("Content-Type", "") else "utf-8"
        )
        return answer.text

    def _refuse_stranger(self, answer: requests.Response) -> None:
        """Raises UserError where the dashboard does not take the token, or sends it elsewhere."""
        if answer.status_code in (401, 403):
            raise UserError(
                f"--address {self.address} refuses"
                f" {'this' if self._token else 'a request without a'} token; name the cluster's in"
                " RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN"
            )
        if 300 <= answer.status_code < 400:
            raise UserError(
                f"--address {self.address} answered {answer.status_code}, a redirect, and the token"
                " goes to no other address; name the dashboard itself"
            )

    def quote(self, said: str) -> str:
        """What a server said, without the token, which it may have said too."""
        return (said.replace(self._token, "(the token)") if self._token else said)[:300]

    async def stream(self, path: str, say: Callable[[str], None]) -> None:
        """Says what a web socket of the dashboard sends, until it closes. Raises aiohttp's
        errors."""
        import aiohttp

        # the certificates are those that the other requests are checked by
        url = self.address + path
        verify = self._client.verify
        context = None
        if isinstance(verify, str):
            folder = Path(verify).is_dir()
            context = ssl.create_default_context(
                cafile=None if folder else verify, capath=verify if folder else None
            )

        # Ray takes its token as a header
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        async with (
            aiohttp.ClientSession(headers=headers, trust_env=False) as session,
            session.ws_connect(url, proxy=proxy_of(url), ssl=context or True) as pieces,
        ):
            async for piece in pieces:
                if piece.type == aiohttp.WSMsgType.TEXT:
                    say(piece.data)
            if pieces.close_code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
                raise aiohttp.ClientConnectionError("the connection broke off")

    def ray_client(self) -> JobSubmissionClient:
        """Ray's own client, over ours."""
        from rlalign.runtime.cluster import prepare_environment

        # a wrong address is refused here, before Ray's client meets it
        prepare_environment(self.address)
        self.ask("/api/version")
        from ray.job_submission import JobSubmissionClient

        for noisy in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(noisy).setLevel(logging.ERROR)  # they tell how they pack
        dashboard = self

        # requests of Ray's client pass through the same checks as ours
        class Jobs(JobSubmissionClient):
            def _do_request(
                self, method: str, endpoint: str, *, json_data: Any = None, **more: Any
            ) -> Any:
                answer = dashboard._client.request(
                    method, dashboard.address + endpoint, json=json_data, **more
                )
                dashboard._refuse_stranger(answer)
                return answer

        assert hasattr(JobSubmissionClient, "_do_request"), (
            "Ray's client asks by another method now"
        )
        return Jobs(self.address)
