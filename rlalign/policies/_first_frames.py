"""The picture that a prompt carries, for a policy that goes on from it."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

from rlalign.core.prompts import record_of
from rlalign.core.registry import UserError

FIELD = "image"
"""Of a prompt's record: the path of a picture's file, or its bytes as a data URI."""
DATA = "base64,"
GREY = "data:image/x-portable-pixmap;base64,UDYgMSAxIDI1NQqAgIA="
"""A picture of one pixel."""


def source_of(prompt: str) -> str:
    """Where a prompt's picture is. Raises UserError for a prompt that carries none."""
    found = record_of(prompt).get(FIELD)
    if not isinstance(found, str) or not found:
        raise UserError(
            f"prompts: each must carry a picture in the field {FIELD!r} of its record (a file's"
            f" path, or a data URI) for a policy that goes on from one, got {found!r} with"
            f" {str(prompt)!r}; name a table with a column {FIELD}"
        )
    return found


def open_picture(source: str) -> Any:
    """The picture, RGB, of Pillow. Raises UserError where there is none, or where it is damaged."""
    from PIL import Image

    is_data = source.startswith("data:")
    shown = f"{source[:32]}..." if is_data else source
    try:
        place: Any = source
        if is_data:
            _, mark, text = source.partition(DATA)
            place = io.BytesIO(base64.b64decode(text if mark else "", validate=True))
        with Image.open(place) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, binascii.Error, Image.DecompressionBombError) as error:
        raise UserError(
            f"prompts: {FIELD} {shown!r} cannot be read as a picture ({error}); name an existing"
            " PNG, JPEG or WebP file"
        ) from error
