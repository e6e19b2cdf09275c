"""One S3 server a process, and a bucket of its own for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from rlalign.storage import lease, session
from tests.stores import Bucket, make_bucket, name_store, s3_server


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as address:
        yield address


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    name_store(monkeypatch, endpoint)
    return make_bucket(endpoint, f"bucket-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens every few seconds happens all the time."""
    monkeypatch.setattr(session, "PERIOD_SECONDS", 0.02)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.02)
