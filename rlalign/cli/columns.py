"""Names and values as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Mapping


def say(rows: Mapping[str, str]) -> None:
    """Prints names and values in two columns."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
