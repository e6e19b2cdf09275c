"""What tells the text encoders of two checkpoints apart, without reading all of their weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from rlalign.networks.pipelines.loading import WEIGHTS, variant_of

SAMPLE = 256
"""Bytes that are read of each tensor, from its middle."""
OF_THE_LIBRARY = ("transformers_version", "dtype", "torch_dtype", "architectures")
"""Keys of a config.json that say who wrote it and how; others that do begin with _."""


def digest_settings(folder: Path) -> str:
    """A digest of a part's small files: configs, vocabularies, templates."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.iterdir()):
        if file.is_file() and ".safetensors" not in file.suffixes and file.suffix != ".bin":
            found.update(file.name.encode() + b"\0" + _content(file) + b"\0")
    return found.hexdigest()


def _content(file: Path) -> bytes:
    content = file.read_bytes()
    if file.name != "config.json":
        return content
    config = json.loads(content)
    kept = {k: v for k, v in config.items() if k[0] != "_" and k not in OF_THE_LIBRARY}
    return json.dumps(kept, sort_keys=True).encode()


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a part's folder that would be loaded: plain ones, or one variant's;
    none where it has none."""
    files = {file.name: file for file in sorted(folder.iterdir()) if WEIGHTS.fullmatch(file.name)}
    variant = variant_of(list(files))
    return [file for name, file in files.items() if variant_of([name]) == variant]


def digest_weights(files: Iterable[Path]) -> str:
    """A digest of the names, shapes and types of all tensors in safetensors files, and of a sample
    of the numbers of each; "" of no file."""
    found = hashlib.blake2b(digest_size=16)
    tensors = dict(sorted(entry for file in files for entry in _sampled(file).items()))
    for name, content in tensors.items():
        found.update(name.encode() + b"\0" + content)
    return found.hexdigest() if tensors else ""


def _sampled(file: Path) -> dict[str, bytes]:
    """Tensor -> its shape and type, and some of its bytes."""
    found: dict[str, bytes] = {}
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            handle.seek(8 + size + max(begin, (begin + end - SAMPLE) // 2))
            content = handle.read(min(SAMPLE, end - begin))
            found[name] = json.dumps([entry["dtype"], entry["shape"]]).encode() + content
    return found
