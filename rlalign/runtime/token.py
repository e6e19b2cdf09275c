"""The token of a Ray cluster, from where Ray itself looks for it."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from rlalign.core.registry import UserError


def cluster_token() -> str:
    """The token in RAY_AUTH_TOKEN, in the file that RAY_AUTH_TOKEN_PATH names, or in
    ~/.ray/auth_token; "" where there is none.

    Raises UserError for one that no header can carry; the message does not show it.
    """
    found = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    place = "RAY_AUTH_TOKEN"
    if not found:
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or _default_file())
        place = str(file)
        try:
            found = file.read_bytes().decode("utf-8-sig", errors="replace").strip()
        except OSError:
            return ""
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise UserError(
            f"{place}: a cluster's token is printable ASCII without a space, and what is there"
            " is not"
        )
    return found


def make_token() -> None:
    """Makes the token of a Ray that starts here, where there is none, in Ray's own place, for this
    user's eyes alone: whoever reads it may run anything on the cluster, and Ray's own file can be
    read by every user of the machine."""
    settings = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE") == "disabled" or any(map(os.environ.get, settings)):
        return
    file = _default_file()
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")

    # where it cannot be written Ray says so; another process may be first
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            return
        try:
            unfinished.touch(mode=0o600)
            unfinished.write_text(secrets.token_hex(32), encoding="ascii")
            os.link(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)


def _default_file() -> Path:
    return Path.home() / ".ray" / "auth_token"
