"""The token of a Ray cluster, from where Ray itself looks for it."""

from __future__ import annotations

import os
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
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
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
