"""Words of prompts in a file that is written once and mapped into memory, so that no process needs
the text encoders.

A safetensors file. Each tensor has a row for each text; the metadata say which row is which text's
(``index``, by a hash of the model and the text) and what made them (``model``: settings and text
encoders, by name).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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


class EmbeddingsFile:
    """The words in a file: a ``Reader``."""

    def __init__(self, file: Path, model: Mapping[str, str], device: str = "cpu") -> None:
        """``model`` says what the words must have been made by: name -> a setting, or a digest; ""
        is not known here, and not compared. Raises UserError for a file that is none of
        embeddings, or another model's."""
        from safetensors import SafetensorError, safe_open

        self._file = file
        self._device = device
        try:
            self._opened: Any = safe_open(file, "pt")
            metadata = self._opened.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise self._refusal(f"cannot be read ({read_reason(error)})") from error
        if metadata.get("format") != FORMAT:
            raise self._refusal("is no file of embeddings")
        self._model: dict[str, str] = json.loads(metadata["model"])
        self._refuse_other(model)
        self._rows: dict[str, int] = json.loads(metadata["index"])
        self._names = list(self._opened.keys())

    def _refusal(self, what: str) -> UserError:
        return UserError(
            f"policy.embeddings must name a file that rlalign encode has written, got"
            f" {str(self._file)!r}, which {what}; write it with: rlalign encode CONFIG"
            f" {self._file}, or leave the setting empty"
        )

    def _refuse_other(self, model: Mapping[str, str]) -> None:
        for name in [*model, *(n for n in self._model if n not in model)]:
            mine = model.get(name, "none")
            its = self._model.get(name, "none")
            if mine and its and mine != its:
                told = "" if _is_digest(mine) or _is_digest(its) else f": {its}, and not {mine}"
                raise self._refusal(f"was written with another {name}{told}")

    def __contains__(self, text: str) -> bool:
        return key_of(self._model, text) in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, text: str) -> Row:
        """The words of a text, on the device. Raises UserError for one that the file lacks."""
        row = self._rows.get(key_of(self._model, text))
        if row is None:
            # a family may put an instruction of pages before a prompt
            shown = text if len(text) <= SHOWN else f"...{text[-SHOWN:]}"
            raise UserError(
                f"policy.embeddings: {self._file} has no words of the prompt {shown!r}; add it"
                f" with: rlalign encode CONFIG {self._file}, where CONFIG has that prompt, or leave"
                " the setting empty"
            )
        sliced = {name: self._opened.get_slice(name)[row : row + 1] for name in self._names}
        return {name: tensor.to(self._device) for name, tensor in sliced.items()}


def _is_digest(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)


def write_embeddings(
    file: Path,
    model: Mapping[str, str],
    texts: Sequence[str],
    read: Reader,
    tell: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes the words of texts, whole or not at all; memory holds one text's. ``tell`` hears of
    every text's number.

    The same texts and words give the same bytes.
    """
    first = read(texts[0])
    names = sorted(first)
    index = {key_of(model, text): row for row, text in enumerate(texts)}
    header = _header(model, index, {name: first[name] for name in names})
    starts = {name: len(header) + entry for name, entry in _starts(first, len(texts)).items()}
    with replacing(file) as scratch, scratch.open("wb") as handle:
        handle.write(header)
        handle.truncate(len(header) + len(texts) * row_bytes(first))
        for row, text in enumerate(texts):
            words = first if row == 0 else read(text)
            for name in names:
                tensor = words[name]
                kind = (tensor.shape, tensor.dtype)
                assert kind == (first[name].shape, first[name].dtype), "words of one shape"
                handle.seek(starts[name] + row * tensor.nbytes)
                handle.write(_bytes_of(tensor))
            tell(row + 1)


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


def _header(model: Mapping[str, str], index: Mapping[str, int], row: Row) -> bytes:
    """The head of a safetensors file: its length in eight bytes, then JSON."""
    metadata = {
        "format": FORMAT,
        "index": json.dumps(index),
        "model": json.dumps(dict(sorted(model.items()))),
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    for name, start in _starts(row, len(index)).items():
        tensor = row[name]
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": [len(index), *tensor.shape[1:]],
            "data_offsets": [start, start + len(index) * tensor.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


def distinct(texts: Iterable[str]) -> list[str]:
    """Texts without repetitions, in the order in which they first come."""
    return list(dict.fromkeys(texts))
