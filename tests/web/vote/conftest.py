"""Pages of every mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlalign.ballots.store import Store
from tests.ballots.conftest import empty_place, new_place, postgres_url  # noqa: F401
from tests.web.vote.made_desk import Served, fill, served


@pytest.fixture
def serve_page(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Gives a served page of a mode; ``fill``'s and the server's settings by keyword."""
    with contextlib.ExitStack() as stack:

        def make(mode: str = "pairs", filling: dict[str, Any] | None = None, **settings: Any):
            store = Store.open(tmp_path / f"{mode}.sqlite")
            stack.callback(store.close)
            desk = fill(store, mode, **(filling or {}))
            return stack.enter_context(served(desk, tmp_path, **settings))

        yield make
