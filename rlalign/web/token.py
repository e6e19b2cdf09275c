"""The token between a reward's client and its server: where it is kept, and how it is compared."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence

from rlalign.core.registry import UserError

TOKEN_ENV = "RLALIGN_REWARD_TOKEN"
"""The environment variable that holds the token, on both sides, where the settings name no
other."""

MIN_TOKEN_CHARACTERS = 16


def read_token(variable: str, place: str) -> str:
    """The token in an environment variable. Raises UserError, naming ``place``, where there is none
    or a weak one."""
    # a missing token and a weak one have messages of their own
    token = os.environ.get(variable, "").strip()
    rule = f"{place}: the environment variable {variable} must hold the token that both sides know"
    if not token:
        raise UserError(
            f"{rule}, and is not set; make one: export {variable}="
            "$(python -c 'import secrets; print(secrets.token_urlsafe(32))')"
        )
    if (
        len(token) < MIN_TOKEN_CHARACTERS
        or not token.isascii()
        or not token.isprintable()
        or " " in token
    ):
        raise UserError(
            f"{rule}: at least {MIN_TOKEN_CHARACTERS} printable ASCII characters without a space"
        )
    return token


def digest(token: str | bytes) -> bytes:
    """What a server keeps of a token."""
    return hashlib.sha256(token if isinstance(token, bytes) else token.encode()).digest()


def knows_token(authorization: Sequence[bytes], kept: bytes) -> bool:
    """Whether the values of the request's Authorization header are one bearer token, the one that
    was kept as a digest."""
    if len(authorization) != 1:
        return False
    scheme, _, token = authorization[0].partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(digest(token.strip()), kept)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine and nothing else."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
