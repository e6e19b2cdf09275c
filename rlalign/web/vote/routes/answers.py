"""The forms that answers have: pages, pictures, refusals and faults.

A refusal is ``{"error": sentence, "code": code}``.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rlalign.web.listening import Gone, read_body
from rlalign.web.refused import Refused
from rlalign.web.vote.desk import Declined
from rlalign.web.vote.guard import declined_json
from rlalign.web.vote.templates import Reader


def reader_of(request: Request) -> Reader:
    """How somebody wants a page."""
    return Reader(
        language=request.cookies.get("lang", ""),
        accepted=request.headers.get("accept-language", ""),
        theme=request.cookies.get("theme", ""),
    )


async def body_of(request: Request) -> bytes:
    """The body, whose declared length the guard has seen."""
    return await read_body(int(request.headers["content-length"]), request.receive)


def html(text: str, status: int = 200) -> Response:
    return Response(text, status_code=status, media_type="text/html")


_KINDS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"RIFF", "image/webp"),
)
"""First bytes -> what they begin. Whatever else a file is, no browser is told to run it."""


def picture_headers(content: bytes) -> dict[str, str]:
    """The headers of a picture's file, which never changes."""
    kind = next((kind for start, kind in _KINDS if content.startswith(start)), "")
    return {
        "content-type": kind or "application/octet-stream",
        "cache-control": "private, max-age=604800, immutable",
    }


async def say_refused(_: Request, error: Exception) -> Response:
    """For a ``Refused``."""
    assert isinstance(error, Refused)
    if not isinstance(error, Declined):
        error = Declined(error.status, "malformed", error.sentence)
    headers = {"retry-after": "1"} if error.status == 429 else {}
    return JSONResponse(declined_json(error), status_code=error.status, headers=headers)


async def say_http(_: Request, error: Exception) -> Response:
    """For what Starlette refuses."""
    assert isinstance(error, HTTPException)
    body = {"error": str(error.detail), "code": "malformed"}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def say_fault(_: Request, __: Exception) -> Response:
    """For a fault of ours; the server writes its traceback down."""
    return JSONResponse({"error": "this is a fault of the page", "code": "fault"}, status_code=500)


async def say_nothing(_: Request, __: Exception) -> Response:
    """For a client that has hung up."""
    return Response(status_code=400)


HANDLERS = {
    Refused: say_refused,
    HTTPException: say_http,
    Gone: say_nothing,
    Exception: say_fault,
}
"""Exceptions -> what is answered."""
