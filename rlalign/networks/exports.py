"""Exported safetensors files in another dtype, and with a note of where they come from: rewritten
one tensor after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from rlalign.core.registry import UserError

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
CODES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""As safetensors' header names them."""

_WIDTHS: Mapping[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
"""Bytes of a number; of the others 1."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How far numbers moved."""

    difference: float = 0.0
    """The largest one."""
    name: str = ""
    """The tensor with it."""


def rewrite_folder(folder: Path, dtype: str, note: Mapping[str, str]) -> Rounding:
    """``rewrite`` of every safetensors file under a folder; indices and configs beside them say the
    new sizes and dtype."""
    roundings = []
    for file in sorted(folder.rglob("*.safetensors")):
        found = rewrite(file, dtype, note)
        part = "" if file.parent == folder else f"{file.parent.name}: "
        roundings.append(replace(found, name=part + found.name))
    for index in folder.rglob("*.safetensors.index.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        shards = set(content["weight_map"].values())
        content["metadata"]["total_size"] = sum(_data_bytes(index.parent / n) for n in shards)
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for config in folder.rglob("config.json"):
        content = json.loads(config.read_text(encoding="utf-8"))
        told = [name for name in ("dtype", "torch_dtype") if content.get(name) in DTYPES]
        if told and any(content[name] != dtype for name in told):
            content |= dict.fromkeys(told, dtype)
            config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return _largest(roundings)


def rewrite(file: Path, dtype: str, note: Mapping[str, str]) -> Rounding:
    """Rewrites a safetensors file with its floating numbers in ``dtype`` and the note in its
    metadata; the same tensors and note give the same bytes.

    Scalars, such as an adapter's alpha, stay as they are. Raises UserError for a number that the
    dtype cannot hold.
    """
    from safetensors import safe_open

    scratch = file.with_name(f"{file.name}.rewritten")
    with safe_open(file, "pt") as opened, scratch.open("wb") as target:
        header = _header(opened, DTYPES[dtype], {**(opened.metadata() or {}), **note})
        write_header(target, header)
        roundings = []
        for name in header:
            if name != "__metadata__":
                tensor = opened.get_tensor(name)
                cast = _cast(tensor, DTYPES[dtype])
                roundings.append(_measure(name, tensor, cast))
                target.write(cast.reshape(-1).view(torch.uint8).numpy().data)
    os.replace(scratch, file)
    return _largest(roundings)


def _header(opened: Any, dtype: torch.dtype, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The header of the new file: metadata, then each tensor's dtype, shape and place; wide numbers
    lie first, so that each lies at a multiple of its width."""
    entries: list[tuple[int, str, dict[str, Any]]] = []
    for name in opened.keys():  # noqa: SIM118 - no mapping
        part = opened.get_slice(name)
        code = part.get_dtype()
        shape = list(part.get_shape())
        if shape and code in CODES.values():
            code = CODES[dtype]
        count = torch.Size(shape).numel()
        width = _WIDTHS.get(code, 1)
        entries.append((width, name, {"dtype": code, "shape": shape, "bytes": width * count}))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for _, name, entry in sorted(entries, key=lambda one: (-one[0], one[1])):
        end = offset + entry.pop("bytes")
        header[name] = {**entry, "data_offsets": [offset, end]}
        offset = end
    return header


def write_header(target: BinaryIO, header: Mapping[str, Any]) -> None:
    """Writes the head of a safetensors file: its length, and the JSON that says where each tensor
    lies."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    target.write(len(text).to_bytes(8, "little") + text)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in the dtype, where it is one of floating numbers and no scalar."""
    changes = tensor.ndim > 0 and tensor.dtype in CODES
    return (tensor.to(dtype) if changes else tensor).contiguous()


def _measure(name: str, before: torch.Tensor, after: torch.Tensor) -> Rounding:
    """How far a tensor's numbers moved. Raises UserError where one left the dtype's range."""
    if before.dtype == after.dtype or not before.numel():
        return Rounding()
    if not bool((torch.isfinite(after) | ~torch.isfinite(before)).all()):
        kind = str(after.dtype).removeprefix("torch.")
        raise UserError(
            f"--dtype must be one that holds every weight, and the largest of {name} is"
            f" {before.abs().max().item():g}, got {kind}; take bfloat16 or float32"
        )
    difference = (after.float() - before.float()).abs().max().item()
    return Rounding(difference=difference, name=name)


def _largest(roundings: Iterable[Rounding]) -> Rounding:
    return max(roundings, key=lambda one: one.difference, default=Rounding())


def _data_bytes(file: Path) -> int:
    """Bytes of the tensors in a safetensors file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
    return file.stat().st_size - 8 - size
