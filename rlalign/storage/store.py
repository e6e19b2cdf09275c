"""The objects under a URL: pyarrow's file systems (S3, Google Cloud Storage, Azure, HDFS), and
fsspec's for a scheme that pyarrow does not know.

An object is there whole or not at all: S3, Google's and Azure's stores show an object when its last
byte is there; elsewhere it is written under a hidden name first and then moved. Keys come from
where the tools of each store look for them (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, a
machine's role), what is no secret from the URL's query too, as pyarrow reads it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from rlalign.core.files import replacing
from rlalign.core.registry import UserError

Place = Path | str
"""A folder, or the URL of one."""

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,3}(?=[^/])")
_OF_ARROW = ("gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
_OF_S3 = ("region", "scheme", "endpoint_override", "role_arn", "tls_ca_file_path")
"""Of pyarrow's S3FileSystem: what a URL's query may say."""
_WHOLE = ("s3", "gcs", "abfs")
"""File systems (by pyarrow's name) in which an object appears when it is complete."""
_SECRETS = ("access_key", "secret_key", "session_token", "account_key", "sas_token", "password")
_LONGEST_REASON = 240
_CONNECT_SECONDS = 5.0
_REQUEST_SECONDS = 60.0
"""Without a byte on the way."""
_PIECE = 16 << 20
"""Bytes that are held in memory of a file on its way."""


class StoreError(OSError):
    """What a store answered, or that it did not: in one line."""


def is_url(place: Place) -> bool:
    """Whether a place is a URL, also one that went through a Path, which halves its slashes."""
    return _URL.match(str(place)) is not None


def find_place(place: Place) -> Place:
    """The folder that a place names, or its URL as text. ``file://`` names a folder. Raises
    UserError for a URL that cannot be one of a run folder."""
    text = str(place)
    found = _URL.match(text)
    if found is None:
        return Path(text)
    scheme = found.group(1)
    if scheme == "file":
        return Path("/" + unquote(text[found.end() :]))
    slashes = ":///" if scheme in ("local", "hdfs", "viewfs") and ":///" in text else "://"
    url = scheme + slashes + text[found.end() :]
    check_url(url)
    return url


def check_url(url: str, place: str = "") -> None:
    """Raises UserError for a URL without a folder in it, and for one that holds a key."""
    parts = urlsplit(url)
    at = place or re.sub("//[^@/]*@", "//***@", url.partition("?")[0])
    query = dict(parse_qsl(parts.query))
    has_user = "@" in parts.netloc and parts.scheme in ("s3", "gs", "gcs")
    if has_user or query.keys() & {*_SECRETS}:
        raise UserError(
            f"{at} must hold no key and no password: a command line"
            " is read by everybody. Name them in the environment, as AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or in AWS_PROFILE"
        )
    is_local = parts.scheme in ("local", "hdfs", "viewfs")
    if not parts.path.strip("/") or not (parts.netloc or is_local) or parts.fragment:
        raise UserError(
            f"{at} must name a bucket and a folder in it, as s3://bucket/runs/first, got {url!r}"
        )


def base_name(place: Place) -> str:
    """The last part of a folder's path or of its URL."""
    return Path(urlsplit(str(place)).path if is_url(place) else place).name


class Store:
    """The objects under a URL; names are relative to it, with slashes.

    Each method raises StoreError where the store does not do it, and FileNotFoundError for a name
    that is not there.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = url.partition("?")[0].rstrip("/")
        """Without the query: what objects are called by."""
        with _store_errors():
            self._files, root = _open(url)
        self._root = root.rstrip("/")
        self._is_whole = self._files.type_name in _WHOLE

    def has_bucket(self) -> bool:
        """Whether what holds the folder is there; of other than object stores always."""
        from pyarrow.fs import FileType

        if not self._is_whole:
            return True
        with _store_errors():
            bucket = self._root.lstrip("/").partition("/")[0]
            return self._files.get_file_info(bucket).type != FileType.NotFound

    def list(self) -> dict[str, int]:
        """Name -> bytes of every object; hidden ones are left out."""
        from pyarrow.fs import FileSelector

        with _store_errors():
            found = self._files.get_file_info(
                FileSelector(self._root, recursive=True, allow_not_found=True)
            )
        names: dict[str, int] = {}
        for one in found:
            name = one.path.strip("/")[len(self._root.strip("/")) + 1 :]
            if one.is_file and not any(part.startswith(".") for part in name.split("/")):
                names[name] = one.size
        return names

    def read(self, name: str) -> bytes:
        """A small object."""
        with _store_errors(), self._reading(name) as stream:
            return stream.read()

    def fetch(self, name: str, target: Path) -> None:
        """An object as a file, whole or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(target) as scratch,
            scratch.open("wb") as file,
            self._reading(name) as stream,
        ):
            while piece := _read_piece(stream):
                file.write(piece)

    def put(self, name: str, content: bytes) -> None:
        """Writes a small object."""
        with self._writing(name) as stream:
            stream.write(content)

    def send(self, name: str, source: Path) -> None:
        """Writes an object of a file's content; FileNotFoundError is of a file that is gone."""
        with source.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= _PIECE:
                # at once: nothing can break off between two pieces
                self.put(name, file.read())
                return
            with self._writing(name) as stream:
                shutil.copyfileobj(file, stream, _PIECE)

    def delete(self, name: str) -> None:
        """Removes an object; one that is not there is gone."""
        with contextlib.suppress(FileNotFoundError), _store_errors():
            self._files.delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[Any]:
        with _store_errors():
            stream = self._files.open_input_stream(self._at(name), None)
        with stream:
            yield stream

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Any]:
        path = self._at(name)
        with _store_errors():
            if self._is_whole:
                with self._files.open_output_stream(path, None) as stream:
                    yield stream
                return
            folder, _, base = path.rpartition("/")
            scratch = f"{folder}/.{base}.{uuid.uuid4().hex[:8]}"
            self._files.create_dir(folder)
            with self._files.open_output_stream(scratch, None) as stream:
                yield stream
            self._files.move(scratch, path)


def _read_piece(stream: Any) -> bytes:
    with _store_errors():
        return stream.read(_PIECE)


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """What the client of a store raises, of whatever kind, as a StoreError; what is not there stays
    a FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, StoreError, UserError):
        raise
    except Exception as error:
        raise StoreError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The last thing that a client's error says, which is what happened."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r" Detail: \[errno \d+\].*", "", text)
    found = re.search(r"AWS Error (.*)", text)
    return (found.group(1) if found else text)[:_LONGEST_REASON].rstrip(" .")


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the folder in it."""
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    scheme = urlsplit(url).scheme
    if scheme == "s3":
        return _open_s3(url)
    if scheme in _OF_ARROW:
        return FileSystem.from_uri(url)

    # fsspec says itself which package a scheme needs
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{url}: no file system for {scheme}:// is here ({error}); use s3://, gs:// or abfs://,"
            " or install fsspec's package for it"
        ) from error
    return PyFileSystem(FSSpecHandler(files)), root


def _open_s3(url: str) -> tuple[Any, str]:
    """S3's file system, with what the URL's query and the environment say. A small object is put
    by one request, and a request that fails is repeated once: whoever asks has more patience."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    parts = urlsplit(url)
    settings: dict[str, Any] = dict(parse_qsl(parts.query))
    if unknown := sorted(settings.keys() - {*_OF_S3}):
        raise UserError(
            f"{url.partition('?')[0]}: the query of the URL must be of {', '.join(_OF_S3)}, got"
            f" {unknown[0]!r}"
        )
    if "endpoint_override" not in settings and (endpoint := _endpoint()):
        settings |= endpoint
    if "region" not in settings:
        settings["region"] = _region(parts.netloc, has_endpoint="endpoint_override" in settings)
    files = S3FileSystem(
        **settings,
        allow_delayed_open=True,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=2),
    )
    return files, f"{parts.netloc}{unquote(parts.path)}"


def _endpoint() -> dict[str, str]:
    """Scheme and address of the environment's own endpoint, which S3FileSystem does not read."""
    named = [os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")]
    url = next((one for one in named if one), "")
    if not url:
        return {}
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(
            f"AWS_ENDPOINT_URL must be a URL as https://minio.example:9000, got {url!r}"
        )
    return {"scheme": parts.scheme, "endpoint_override": f"{parts.netloc}{parts.path}".rstrip("/")}


def _region(bucket: str, *, has_endpoint: bool) -> str:
    """The environment's region; beside an endpoint of one's own any does, else AWS is asked for the
    bucket's."""
    from pyarrow.fs import resolve_s3_region

    named = [os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION")]
    found = next((one for one in named if one), "")
    return found or ("us-east-1" if has_endpoint else resolve_s3_region(bucket))
