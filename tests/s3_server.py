"""A small S3 server, over HTTP as S3 speaks it: buckets, objects with ranges, listings, uploads in
parts. ``python tests/s3_server.py PORT`` serves on loopback what it holds in memory, until it is
killed. Keys are not looked at.

Source: Amazon S3's API reference, of 2006-03-01.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import uuid
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Object(NamedTuple):
    content: bytes
    changed: str
    tag: str


class Held:
    """What the server holds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.buckets: dict[str, dict[str, Object]] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    held = Held()

    def do_PUT(self) -> None:
        bucket, key, query = self._parts()
        body = self._body()
        with self.held.lock:
            if not key:
                self.held.buckets.setdefault(bucket, {})
                return self._answer(200)
            if bucket not in self.held.buckets:
                return self._refuse(404, "NoSuchBucket")
            if "partNumber" not in query:
                tag = self._store(bucket, key, body)
            elif query["uploadId"] not in self.held.uploads:
                return self._refuse(404, "NoSuchUpload")
            else:
                self.held.uploads[query["uploadId"]][int(query["partNumber"])] = body
                tag = _tag(body)
        return self._answer(200, ETag=tag)

    def do_POST(self) -> None:
        bucket, key, query = self._parts()
        body = self._body().decode()
        with self.held.lock:
            if bucket not in self.held.buckets:
                return self._refuse(404, "NoSuchBucket")
            if "uploads" in query:
                name = uuid.uuid4().hex
                self.held.uploads[name] = {}
                said = (
                    f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{name}</UploadId>"
                )
                return self._say("InitiateMultipartUploadResult", said)
            parts = self.held.uploads.pop(query.get("uploadId", ""), None)
            if parts is None:
                return self._refuse(404, "NoSuchUpload")
            # the object appears now, of the parts that are named
            numbers = [int(n) for n in re.findall("<PartNumber>([0-9]+)</PartNumber>", body)]
            tag = self._store(bucket, key, b"".join(parts[number] for number in numbers))
        return self._say("CompleteMultipartUploadResult", f"<ETag>{escape(tag)}</ETag>")

    def do_DELETE(self) -> None:
        bucket, key, query = self._parts()
        with self.held.lock:
            if "uploadId" in query:
                self.held.uploads.pop(query["uploadId"], None)
            else:
                self.held.buckets.get(bucket, {}).pop(key, None)
        self._answer(204)

    def do_GET(self) -> None:
        bucket, key, query = self._parts()
        with self.held.lock:
            objects = dict(self.held.buckets.get(bucket, {}))
            if bucket not in self.held.buckets:
                return self._refuse(404, "NoSuchBucket")
        if not key:
            return (
                self._list(bucket, objects, query) if self.command == "GET" else self._answer(200)
            )
        found = objects.get(key)
        if found is None:
            return self._refuse(404, "NoSuchKey")
        headers = {"ETag": found.tag, "Last-Modified": found.changed}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._answer(200, found.content, **headers)
        first, size = int(asked[1]), len(found.content)
        if first >= size:
            return self._refuse(416, "InvalidRange")
        last = min(int(asked[2] or size - 1), size - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self._answer(206, found.content[first : last + 1], **headers)

    do_HEAD = do_GET

    def _list(self, bucket: str, objects: dict[str, Object], query: dict[str, str]) -> None:
        """ListObjectsV2, in pages; what a delimiter ends is a common prefix."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most, after = int(query.get("max-keys", 1000)), query.get("continuation-token", "")
        after = max(after, query.get("start-after", ""))
        said: dict[str, str] = {}
        for key in sorted(objects):
            rest = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                common = prefix + rest.partition(delimiter)[0] + delimiter
                named = f"<Prefix>{escape(common)}</Prefix>"
                said[common] = f"<CommonPrefixes>{named}</CommonPrefixes>"
            else:
                one = objects[key]
                said[key] = (
                    f"<Contents><Key>{escape(key)}</Key><Size>{len(one.content)}</Size>"
                    f"<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    f"<ETag>{escape(one.tag)}</ETag></Contents>"
                )
        names = [name for name in said if name > after]
        page = names[:most]
        is_cut = len(names) > most
        more = (
            f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if is_cut else ""
        )
        self._say(
            "ListBucketResult",
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(is_cut).lower()}</IsTruncated>{more}"
            + "".join(said[name] for name in page),
        )

    def _store(self, bucket: str, key: str, content: bytes) -> str:
        made = Object(content, formatdate(usegmt=True), _tag(content))
        self.held.buckets[bucket][key] = made
        return made.tag

    def _parts(self) -> tuple[str, str, dict[str, str]]:
        """Bucket, key and query."""
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = parse_qs(parts.query, keep_blank_values=True)
        return bucket, key, {name: values[0] for name, values in query.items()}

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self._read_pieces()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return body
        # the body's own pieces, each behind its size; checksums follow
        content = b""
        while True:
            size, _, body = body.partition(b"\r\n")
            length = int(size.partition(b";")[0], 16)
            if length == 0:
                return content
            content += body[:length]
            body = body[length + 2 :]

    def _read_pieces(self) -> bytes:
        body = b""
        while length := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _say(self, name: str, content: str) -> None:
        place = "http://s3.amazonaws.com/doc/2006-03-01/"
        text = f'<?xml version="1.0" encoding="UTF-8"?><{name} xmlns="{place}">{content}</{name}>'
        self._answer(200, text.encode(), **{"Content-Type": "application/xml"})

    def _refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
        self._answer(status, text.encode(), **{"Content-Type": "application/xml"})

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def _tag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
