"""A request that is not served, and what the client is told."""

from __future__ import annotations

import json


class Refused(Exception):
    """A request that is not served: an HTTP status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def error_body(sentence: str) -> bytes:
    """The answer to a request that is refused or has failed."""
    return json.dumps({"error": sentence}).encode()
