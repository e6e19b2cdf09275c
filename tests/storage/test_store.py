"""URLs, and objects on a real S3 server and on a file system of fsspec's."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rlalign.core.registry import UserError
from rlalign.storage import folders, session, store
from rlalign.storage.store import Store, StoreError, base_name, check_url, find_place, is_url
from tests.servers import scripted
from tests.stores import Bucket, name_store


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("runs/first", Path("runs/first")),
        ("/a/b", Path("/a/b")),
        ("~/a:b/c", Path("~/a:b/c")),
        ("file:///a/b%20c", Path("/a/b c")),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        ("s3://b/a?region=eu-west-1&scheme=http", "s3://b/a?region=eu-west-1&scheme=http"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("local:///tmp/a", "local:///tmp/a"),
    ],
)
def test_a_place_is_a_folder_or_a_url(text: str | Path, place: str | Path) -> None:
    assert find_place(text) == place
    assert is_url(text) == (isinstance(place, str) or str(text).startswith("file:"))


def test_the_last_part_of_a_place_is_its_name() -> None:
    assert base_name("/a/b") == "b"
    assert base_name("s3://bucket/a/b?endpoint_override=127.0.0.1:9000/x") == "b"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket", "must name a bucket and a folder in it"),
        ("s3://bucket/", "must name a bucket and a folder in it"),
        ("s3://bucket/a#b", "must name a bucket and a folder in it"),
        ("s3://KEY:HUSH@bucket/a", r"s3://\*\*\*@bucket/a must hold no key and no password"),
        ("s3://bucket/a?access_key=K&secret_key=HUSH", "must hold no key and no password"),
    ],
)
def test_a_url_names_a_folder_and_holds_no_key(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_url(url)
    assert "HUSH" not in str(caught.value)


def test_a_scheme_that_nobody_knows_is_named() -> None:
    with pytest.raises(UserError, match="no file system for nowhere://"):
        Store("nowhere://a/b")


@pytest.fixture(params=["s3", "local"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(f"local://{tmp_path}/run")
    return Store(request.getfixturevalue("bucket").url("runs/first"))


def test_objects_come_back_and_are_listed(
    made: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PIECE", 1000)
    source = tmp_path / "source"
    assert made.has_bucket()
    assert made.list() == {}
    made.put("a.json", b"{}")
    made.put("a.json", b"{1}")
    made.put(".hidden", b"x")
    for name, size in (("deep/er/small", 1000), ("deep/large", 2500), ("deep/none", 0)):
        source.write_bytes(bytes(range(250)) * (size // 250))
        made.send(name, source)
    assert made.list() == {
        "a.json": 3,
        "deep/er/small": 1000,
        "deep/large": 2500,
        "deep/none": 0,
    }
    assert made.read(".hidden") == b"x"
    made.fetch("deep/large", tmp_path / "there" / "large")
    assert (tmp_path / "there" / "large").read_bytes() == bytes(range(250)) * 10
    for name in ("deep/large", "deep/large", "never"):
        made.delete(name)
    assert sorted(made.list()) == ["a.json", "deep/er/small", "deep/none"]
    for ask in (made.read, lambda name: made.fetch(name, tmp_path / "there" / "none")):
        with pytest.raises(FileNotFoundError):
            ask("deep/large")
    assert not (tmp_path / "there" / "none").exists()
    with pytest.raises(FileNotFoundError):
        made.send("never", tmp_path / "never")


def test_names_are_keys_in_the_bucket(bucket: Bucket) -> None:
    Store(bucket.url("runs/first")).put("deep/a b.json", b"{}")
    assert bucket.list() == ["runs/first/deep/a b.json"]
    assert bucket.read("runs/first/deep/a b.json") == b"{}"


def test_a_bucket_that_is_not_there_is_named(bucket: Bucket) -> None:
    with (
        pytest.raises(UserError, match="s3://no-such/run: there is no such bucket, or this key"),
        folders.look_at("s3://no-such/run"),
    ):
        pass


def refusal(code: str, status: int) -> tuple[int, dict[str, str], bytes]:
    said = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>"
    return status, {"Content-Type": "application/xml"}, said.encode()


@pytest.mark.parametrize(("code", "status"), [("AccessDenied", 403), ("InvalidAccessKeyId", 403)])
def test_a_key_that_may_not_is_told_at_once(
    code: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(refusal(code, status)) as server:
        name_store(monkeypatch, server.url)
        with (
            pytest.raises(UserError, match="s3://bucket/run: .*see that the URL, AWS_ENDPOINT_URL"),
            folders.look_at("s3://bucket/run"),
        ):
            pass


def test_a_store_that_is_full_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with scripted(refusal("InsufficientStorage", 507)) as server:
        name_store(monkeypatch, server.url)
        with pytest.raises(StoreError, match="507"):
            Store("s3://bucket/run").put("a", b"x")


def test_working_folders_of_processes_that_have_ended_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that is kept, and not those of other machines, whose processes are not seen here."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with folders.look_at(f"local://{tmp_path}/run") as first:
        home, machine = first.parent, first.name.partition("-")[0]
        gone, kept, other = (
            home / f"{name}-{ended.pid}-{number}"
            for number, name in enumerate((machine, machine, "elsewhere"))
        )
        for folder in (gone, kept, other):
            folder.mkdir()
        (kept / session.KEPT).touch()
        with folders.look_at(f"local://{tmp_path}/run") as second:
            assert set(home.iterdir()) == {first, second, kept, other}
    assert set(home.iterdir()) == {kept, other}
    assert home.stat().st_mode & 0o777 == 0o700
