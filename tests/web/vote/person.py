"""A person who talks to the page over HTTP without a browser."""

from __future__ import annotations

import itertools
from typing import Any

import requests


class Person:
    """Joins, asks and votes; every answer is kept for a look at its headers."""

    def __init__(self, url: str, **join: str) -> None:
        self.url = url
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.headers["Origin"] = url
        self.answers: list[requests.Response] = []
        self._nonces = (f"nonce {number}" for number in itertools.count())
        self.joined = self.post("/join", join)

    def get(self, path: str, **settings: Any) -> requests.Response:
        return self._kept(self.session.get(self.url + path, **settings))

    def post(self, path: str, body: Any, **settings: Any) -> requests.Response:
        return self._kept(self.session.post(self.url + path, json=body, **settings))

    def _kept(self, answer: requests.Response) -> requests.Response:
        self.answers.append(answer)
        return answer

    def ballot(self) -> dict[str, Any]:
        return self.get("/ballot").json()

    def vote(self, ballot: str, choice: str = "left", **more: Any) -> requests.Response:
        body = {"ballot": ballot, "nonce": next(self._nonces), "choice": choice, **more}
        return self.post("/vote", body)

    def undo(self) -> requests.Response:
        return self.post("/undo", {"nonce": next(self._nonces)})
