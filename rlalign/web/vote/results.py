"""The numbers of /results, as the template shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def lay_out(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the template fills in."""
    return dict(found)
