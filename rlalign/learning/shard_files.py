"""Tensors that several processes hold, in a file of each: what ``torch.distributed.checkpoint``
writes as safetensors, with a checksum of every piece.

    shard-00001-model-00001-of-00001.safetensors     pieces of process 0, one after the other
    shard-00002-model-00001-of-00001.safetensors     of process 1

A piece is the rows that a process holds of a tensor. The head of a file says where each of its
pieces begins in its tensor (as torch's own reader reads it), and its SHA-256; whoever keeps the
digests of the heads can tell what is damaged. Any number of processes reads them, each its own
rows, and one process tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as group

from rlalign.core.registry import UserError
from rlalign.networks.shares import TensorsByRows
from rlalign.storage import name_of

PLACES = "DCP_SHARDING_INFO"
"""Entry of a head, torch's: name -> where its piece begins in the tensor, as JSON."""
DIGESTS = "sha256"
"""Entry of a head: name -> the piece's digest, as JSON."""
_FORMAT = {"format": "pt", "DCP_VERSION": "1.0"}
_PIECE = 4 << 20
"""Bytes that are read, or written, while those before are hashed."""
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def damage(folder: Path, said: str) -> UserError:
    """What a user is told of a checkpoint that cannot be read; ``said`` is what is wrong."""
    name = name_of(folder)
    return UserError(f"checkpoint {name} {said}; delete {name} to resume from the one before it")


# --- writing --------------------------------------------------------------------------------------


def write_together(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Writes tensors of all processes of torch's group into a folder that is there: name of a file
    -> the digest of its head. Every process has to ask, with tensors of the same names; raises in
    all of them what one has raised."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    _refuse_unseen(folder)
    writer = _writer(folder)
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        raise next((f for f in failures if isinstance(f, OSError)), failures[0]) from error

    # each process has written files of its own
    heads: list[dict[str, str]] = [{}] * group.get_world_size()
    group.all_gather_object(heads, writer.heads)
    return dict(ChainMap(*heads))


def _refuse_unseen(folder: Path) -> None:
    seen = [False] * group.get_world_size()
    group.all_gather_object(seen, folder.is_dir())
    if not all(seen):
        raise UserError(
            f"with learner.shard all every learner writes its part of a checkpoint, and learner"
            f" {seen.index(False)} does not see {folder}; put the run folder on a disk that all"
            " learners share, or all learners on one machine"
        )


def _writer(folder: Path) -> Any:
    """torch's writer of safetensors, which writes the pieces of a process one after the other: its
    own makes the whole file in memory first."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.futures import Future

    class Writer(HuggingFaceStorageWriter):
        heads: dict[str, str]

        def write_data(self, plan: Any, planner: Any) -> Any:
            self.heads = {}
            items = [one for one in plan.items if one.tensor_data.chunk.sizes.numel()]
            pieces = [
                Piece(
                    name=one.index.fqn,
                    offsets=tuple(one.tensor_data.chunk.offsets),
                    shape=tuple(one.tensor_data.chunk.sizes),
                    dtype=one.tensor_data.properties.dtype,
                )
                for one in items
            ]
            by_name = {one.index.fqn: one for one in items}

            def read(piece: Piece) -> torch.Tensor:
                return planner.resolve_data(by_name[piece.name])

            if pieces:
                number = plan.storage_data["shard_index"]
                name = f"shard-{number:05d}-model-00001-of-00001.safetensors"
                self.heads[name] = write_file(folder / name, pieces, read)
            done: Any = Future()
            done.set_result([])
            return done

    return Writer(str(folder), save_distributed=True)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a file holds of one tensor."""

    name: str
    offsets: tuple[int, ...]
    """Where it begins in the tensor."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_file(file: Path, pieces: Sequence[Piece], read: Callable[[Piece], torch.Tensor]) -> str:
    """Writes a file of pieces, each read when it is its turn; returns the digest of its head. It is
    on the disk when this returns."""
    # wide numbers first, so that each lies at a multiple of its width
    ordered = sorted(pieces, key=lambda one: (-one.dtype.itemsize, one.name))
    digests = {one.name: "0" * 64 for one in ordered}
    head = _make_head(ordered, digests)
    with file.open("wb") as target, ThreadPoolExecutor(1, "digest") as thread:
        target.write(head)
        for piece in ordered:
            tensor = read(piece).detach().cpu().contiguous()
            assert tensor.shape == piece.shape and tensor.dtype == piece.dtype, piece
            digests[piece.name] = _write_piece(target, thread, tensor)
        # digests are of one length, and so is the head
        head = _make_head(ordered, digests)
        target.seek(0)
        target.write(head)
        target.flush()
        os.fsync(target.fileno())
    return hashlib.sha256(head).hexdigest()


def _write_piece(target: BinaryIO, thread: ThreadPoolExecutor, tensor: torch.Tensor) -> str:
    """Writes the bytes of a tensor while they are hashed."""
    numbers = tensor.reshape(-1).view(torch.uint8).numpy().data
    if len(numbers) <= _PIECE:
        target.write(numbers)
        return hashlib.sha256(numbers).hexdigest()
    digest = hashlib.sha256()
    waits = []
    for start in range(0, len(numbers), _PIECE):
        part = numbers[start : start + _PIECE]
        waits.append(thread.submit(digest.update, part))
        target.write(part)
    for one in waits:
        one.result()
    return digest.hexdigest()


def _make_head(pieces: Sequence[Piece], digests: Mapping[str, str]) -> bytes:
    """The head of a file: its length in eight bytes, then JSON."""
    places = {one.name: {"saved_offsets": list(one.offsets)} for one in pieces}
    told = {**_FORMAT, PLACES: json.dumps(places), DIGESTS: json.dumps(dict(digests))}
    content: dict[str, Any] = {"__metadata__": told}
    offset = 0
    for one in pieces:
        content[one.name] = {
            "dtype": _CODES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [offset, offset + one.size],
        }
        offset += one.size
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A piece in its file."""

    file: Path
    begin: int
    """Byte of the file."""
    piece: Piece
    digest: str


class ShardFiles(TensorsByRows):
    """The tensors of a checkpoint's files; each is read, and held against its digest, when it is
    asked for. Raises UserError for what is missing or damaged."""

    def __init__(self, folder: Path, heads: Mapping[str, str]) -> None:
        """``heads`` are what ``write_together`` has returned."""
        self._pieces: dict[str, list[_Stored]] = {}
        for name, digest in heads.items():
            for stored in _read_head(folder / name, digest):
                self._pieces.setdefault(stored.piece.name, []).append(stored)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda one: one.piece.offsets)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __contains__(self, name: object) -> bool:
        return name in self._pieces

    def __getitem__(self, name: str) -> torch.Tensor:
        pieces = [_read_piece(one) for one in self._pieces[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        found = []
        for stored in self._pieces[name]:
            begin = stored.piece.offsets[0]
            low = max(first, begin)
            high = min(end, begin + stored.piece.shape[0])
            if low < high:
                found.append(_read_piece(stored)[low - begin : high - begin])
        if not found:
            one = self._pieces[name][0].piece
            return torch.empty((0, *one.shape[1:]), dtype=one.dtype)
        return found[0] if len(found) == 1 else torch.cat(found)


def _read_head(file: Path, digest: str) -> list[_Stored]:
    """The pieces that a file says it holds."""
    if not file.is_file():
        raise damage(file.parent, f"is incomplete: {file.name} is missing")
    with file.open("rb") as source:
        length = source.read(8)
        size = int.from_bytes(length, "little")
        if size > file.stat().st_size:
            size = 0
        text = source.read(size)
    if hashlib.sha256(length + text).hexdigest() != digest:
        raise damage(file.parent, f"is damaged: {file.name} does not match the checksum")

    # the digest fits: it is what was written
    content = json.loads(text)
    told = content.pop("__metadata__")
    places = json.loads(told[PLACES])
    digests = json.loads(told[DIGESTS])
    return [
        _Stored(
            file=file,
            begin=8 + size + one["data_offsets"][0],
            piece=Piece(
                name=name,
                offsets=tuple(places[name]["saved_offsets"]),
                shape=tuple(one["shape"]),
                dtype=_DTYPES[one["dtype"]],
            ),
            digest=digests[name],
        )
        for name, one in content.items()
    ]


def _read_piece(stored: _Stored) -> torch.Tensor:
    """The numbers of a piece, hashed while they are read."""
    piece = stored.piece
    numbers = torch.empty(piece.size, dtype=torch.uint8)
    target = numbers.numpy().data
    digest = hashlib.sha256()
    with stored.file.open("rb", buffering=0) as source, ThreadPoolExecutor(1, "digest") as thread:
        source.seek(stored.begin)
        at = 0
        while at < len(target):
            count = source.readinto(target[at : at + _PIECE])
            if not count:
                break
            part = target[at : at + count]
            at += count
            if len(target) <= _PIECE:
                digest.update(part)
            else:
                thread.submit(digest.update, part)
    if digest.hexdigest() != stored.digest:
        folder = stored.file.parent
        raise damage(
            folder, f"is damaged: {piece.name} in {stored.file.name} does not match the checksum"
        )
    return numbers.view(piece.dtype).reshape(piece.shape)
