"""Words of prompts in a file that is written once and mapped into memory, so that no process needs
the text encoders.

A safetensors file. Each tensor has a row for each text; the metadata say which row is which text's
(``index``, by a hash of the model and the text) and what made them (``model``: settings and text
encoders, by name).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from rlalign.core.files import replacing
from rlalign.core.registry import UserError, read_reason

FORMAT = "rlalign embeddings 1"
Row = Mapping[str, torch.Tensor]
"""What a denoiser is told of one text: named tensors (1, ...)."""
Reader = Callable[[str], Row]
"""Gives the words of a text."""
SHOWN = 200
"""Characters of a prompt in a message."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
"""Type -> how safetensors calls it."""


def key_of(model: Mapping[str, str], text: str) -> str:
    """The hash of a model and a text."""
    said = json.dumps([dict(sorted(model.items())), text])
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


class RefusedFile(UserError):
    """A file that has not the words which are asked for."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(
            f"policy.embeddings must name a file that rlalign encode has written, got"
            f" {str(file)!r}, which {reason}; write it with: rlalign encode CONFIG {file}, or leave"
            " the setting empty"
        )
        self.reason = reason


class EmbeddingsFile:
    """The words in a file: a ``Reader``."""

    def __init__(self, file: Path, model: Mapping[str, str]) -> None:
        """``model`` says what the words must have been made by: name -> a setting, or a digest; ""
        is not known here, and not compared. Raises UserError for a file that is none of
        embeddings, or another model's."""
        from safetensors import SafetensorError, safe_open

        self._file = file
        try:
            self._opened: Any = safe_open(file, "pt")
            metadata = self._opened.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise RefusedFile(file, f"cannot be read ({read_reason(error)})") from error
        if metadata.get("format") != FORMAT:
            raise RefusedFile(file, "is no file of embeddings")
        self._model: dict[str, str] = json.loads(metadata["model"])
        self._refuse_other(model)
        self._rows: dict[str, int] = json.loads(metadata["index"])
        self._names = list(self._opened.keys())

    def _refuse_other(self, model: Mapping[str, str]) -> None:
        for name in [*model, *(n for n in self._model if n not in model)]:
            mine = model.get(name, "none")
            its = self._model.get(name, "none")
            if mine and its and mine != its:
                told = "" if _is_digest(mine) or _is_digest(its) else f": {its}, and not {mine}"
                raise RefusedFile(self._file, f"was written with another {name}{told}")

    @property
    def keys(self) -> Iterable[str]:
        """The hash of each text that it has words of, in their order."""
        return self._rows.keys()

    def key_of(self, text: str) -> str:
        """The hash of a text."""
        return key_of(self._model, text)

    def row(self, key: str) -> Row:
        """The words of the text with this hash."""
        row = self._rows[key]
        # a slice is a view of the whole tensor in the file; what is kept is a copy of the row
        slices = {name: self._opened.get_slice(name) for name in self._names}
        return {name: one[row : row + 1].clone() for name, one in slices.items()}

    def __call__(self, text: str) -> Row:
        """The words of a text, on the CPU. Raises UserError for one that the file lacks."""
        key = self.key_of(text)
        if key not in self._rows:
            # a family may put an instruction of pages before a prompt
            shown = text if len(text) <= SHOWN else f"...{text[-SHOWN:]}"
            raise UserError(
                f"policy.embeddings: {self._file} has no words of the prompt {shown!r}; add it"
                f" with: rlalign encode CONFIG {self._file}, where CONFIG has that prompt, or leave"
                " the setting empty"
            )
        return self.row(key)


def _is_digest(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)


def write_embeddings(
    file: Path,
    model: Mapping[str, str],
    rows: Mapping[str, Callable[[], Row]],
    tell: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes words, whole or not at all; memory holds one text's.

    ``rows`` is the hash of each text (``key_of``) -> what gives its words, all of the same shapes;
    ``tell`` hears how many are done. The same words give the same bytes.
    """
    keys = list(rows)
    first = rows[keys[0]]()
    header = _header(model, keys, first)
    starts = {name: len(header) + at for name, at in _starts(first, len(keys)).items()}
    with replacing(file) as scratch, scratch.open("wb") as handle:
        # a disk that is too small says so now
        handle.write(header)
        handle.flush()
        _reserve(handle, len(header) + len(keys) * row_bytes(first))
        for number, key in enumerate(keys):
            row = first if number == 0 else rows[key]()
            for name, tensor in row.items():
                kind = (tensor.shape, tensor.dtype)
                assert kind == (first[name].shape, first[name].dtype), "words of one shape"
                handle.seek(starts[name] + number * tensor.nbytes)
                handle.write(_bytes_of(tensor))
            tell(number + 1)


def _reserve(handle: IO[bytes], size: int) -> None:
    """Makes a file so large, and has the room on the disk where the system can promise that."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle.fileno(), 0, size)
    else:
        handle.truncate(size)


def row_bytes(row: Row) -> int:
    """Bytes of one text's words."""
    return sum(tensor.nbytes for tensor in row.values())


def _starts(row: Row, count: int) -> dict[str, int]:
    """Where each tensor begins, of so many rows: tensors with larger numbers first, so that each
    begins at a multiple of its own."""
    found: dict[str, int] = {}
    at = 0
    for name in sorted(row, key=lambda n: (-row[n].element_size(), n)):
        found[name] = at
        at += count * row[name].nbytes
    return found


def _header(model: Mapping[str, str], keys: Sequence[str], row: Row) -> bytes:
    """The head of a safetensors file: its length in eight bytes, then JSON."""
    metadata = {
        "format": FORMAT,
        "index": json.dumps({key: number for number, key in enumerate(keys)}),
        "model": json.dumps(dict(sorted(model.items()))),
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    for name, start in _starts(row, len(keys)).items():
        tensor = row[name]
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": [len(keys), *tensor.shape[1:]],
            "data_offsets": [start, start + len(keys) * tensor.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()
