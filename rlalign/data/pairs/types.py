"""Which Arrow types the columns of a file of pairs may have, and how they become a few plain
ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

_PICTURES = (
    "the bytes of picture files (binary, or the struct of bytes and path that Hugging Face's"
    " datasets write); base64 and lists must be turned into bytes"
)
_LABELS = "numbers (floating point, whole, decimal, or bool)"
_FLAGS = "true and false (bool, or whole numbers)"

RULES: dict[str, str] = {
    "caption": "text (string)",
    "jpg_0": _PICTURES,
    "jpg_1": _PICTURES,
    "label_0": _LABELS,
    "label_1": _LABELS,
    "are_different": _FLAGS,
    "has_label": _FLAGS,
    "model_0": "text (string), or whole numbers",
}
"""Column that is read -> what it must hold."""

NO_TEXT = "\0"
"""What stands for a caption that is not UTF-8. A caption that holds a NUL is no text either."""


def is_read(name: str, kind: pa.DataType) -> bool:
    """Says whether a column of ``RULES`` may have this type."""
    import pyarrow.types as types

    # the values decide, without an extension type or a dictionary around them
    kind = _inner_type(kind)
    rule = RULES[name]
    if rule == _LABELS:
        return (
            types.is_floating(kind)
            or types.is_integer(kind)
            or types.is_boolean(kind)
            or types.is_decimal(kind)
        )
    if rule == _FLAGS:
        return types.is_boolean(kind) or types.is_integer(kind) or types.is_null(kind)

    # pictures, and all other columns as text
    if name.startswith("jpg_"):
        return _is_bytes(kind) or _is_image_struct(kind)
    return _is_text(kind) or (name == "model_0" and (types.is_integer(kind) or types.is_null(kind)))


def plain_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with the columns of ``RULES`` in plain types; other columns stay as they are.

    Parquet does not promise that text is UTF-8: a caption that is not becomes ``NO_TEXT``, any
    other such text null.
    """
    import pyarrow as pa

    columns: list[Any] = []

    # each column is brought to the one type that its rule asks for
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        rule = RULES.get(name, "")
        column = _inner_array(column) if rule else column
        if rule == _LABELS:
            column = column.cast(pa.float64(), safe=False)
        elif rule == _FLAGS:
            column = column.cast(pa.bool_())
        elif name.startswith("jpg_"):
            column = _image_struct(column) if pa.types.is_struct(column.type) else _bytes(column)
        elif rule:
            column = _text(column, NO_TEXT if name == "caption" else None)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def picture_source(value: Any, folder: Path) -> bytes | Path | None:
    """Where the picture of a row is: its bytes, or a file; None where it is missing.

    ``folder`` is the Parquet file's own: paths are named from there. ``value`` is a row's ``jpg_0``
    or
    ``jpg_1`` as ``plain_batch`` and ``to_pylist`` give it.
    """
    if not isinstance(value, dict):
        return value
    return value["bytes"] or (folder / value["path"] if value["path"] else None)


def _inner_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values themselves, without an extension type or a dictionary around them."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


def _inner_array(column: Any) -> Any:
    import pyarrow as pa

    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    sized = types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    return sized or types.is_binary_view(kind)


def _is_image_struct(kind: pa.DataType) -> bool:
    """Says whether a type is Hugging Face's Image: a struct of ``bytes`` and ``path``, one maybe
    null."""
    import pyarrow.types as types

    if not types.is_struct(kind):
        return False
    fields = [(field.name, field.type) for field in kind]
    if [name for name, _ in fields].count("bytes") != 1 or [name for name, _ in fields].count(
        "path"
    ) > 1:
        return False
    parts = dict(fields)
    path = parts.get("path")
    return (_is_bytes(parts["bytes"]) or types.is_null(parts["bytes"])) and (
        path is None or _is_text(path) or types.is_null(path)
    )


def _image_struct(column: Any) -> Any:
    """A struct of ``bytes`` (any type of bytes) and ``path`` (string) alone."""
    import pyarrow as pa

    parts = dict(zip([field.name for field in column.type], column.flatten(), strict=True))
    path = parts.get("path", pa.nulls(len(column), pa.string()))
    return pa.StructArray.from_arrays(
        [_bytes(parts["bytes"]), _text(path)], names=["bytes", "path"]
    )


def _bytes(column: Any) -> Any:
    """A column of bytes, not as views, of which Arrow cannot take rows."""
    import pyarrow as pa

    return column.cast(pa.binary()) if pa.types.is_binary_view(column.type) else column


def _text(column: Any, broken: str | None = None) -> Any:
    """A column of text as strings, with ``broken`` in place of what is not UTF-8."""
    import pyarrow as pa

    column = column.cast(pa.string(), safe=False)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return pa.array(
            [_decoded(one, broken) for one in column.cast(pa.binary()).to_pylist()], pa.string()
        )
    return column


def _decoded(text: bytes | None, broken: str | None) -> str | None:
    try:
        return None if text is None else text.decode("utf-8")
    except UnicodeDecodeError:
        return broken
