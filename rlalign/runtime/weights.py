"""Weights on their way to the workers: in chunks of bounded size, each one object in the store.

    learner   rows of tensors --pack--> chunk --put--> store of its node
                                                            |
                                                    once for each node
                                                            v
    worker    its own weights <--copy-- chunk, mapped <-- store of its node

A chunk is put while the next is packed, and copied while the next is on its way. Each node asks for
them in an order of its own, a few at a time, so that nodes give one another what they have.

Whoever publishes gets one reference, to a ``Manifest``: the chunks of what this process has to
give. That reference is all that orders, the coordinator and a call to a worker carry. A worker
asks for the chunks itself, begins to do so while it still works under older weights, and takes
them over one after the other between two units: beside its own weights memory holds one chunk, and
that in the store, which all workers of a node share.

Several processes may publish one version together, each the rows that it holds: a row is a slice
of a tensor's first dimension, and ``WeightsRef.manifests`` has one reference for each process.
``Rows.first`` is the number of the first row in the whole tensor; a tensor of no dimensions is one
row. Every row of every tensor has to be in exactly one of the manifests, in any order; who reads
them checks it (``Policy.set_rows``).

Weights that the receiver rounds to bfloat16 before each use (``precision.rounded_names``) are sent
so, at half the bytes: rounding twice is rounding once, so its numbers are the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
import ray
import torch

Asked = TypeVar("Asked")

CHUNK_BYTES = 64 * 2**20
"""Of a chunk at most, unless a single row is larger."""
AT_ONCE = 2
"""Chunks that a node asks for at a time. Who asks for all at once asks the publisher's node for
all, since no other one has any yet."""
ALIGNMENT = 64
"""Pieces begin at multiples of so many bytes."""


class Rows(NamedTuple):
    """Rows of one named tensor."""

    name: str
    tensor: torch.Tensor
    first: int = 0
    """Number of the first of them in the whole tensor."""

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> list[Rows]:
        """Whole tensors."""
        return [cls(name, tensor) for name, tensor in tensors.items()]


class Piece(NamedTuple):
    """Where rows of one tensor lie in a chunk."""

    name: str
    first: int
    """Number of the first row in the whole tensor."""
    shape: tuple[int, ...]
    """Of these rows; () of a tensor of no dimensions."""
    dtype: torch.dtype
    """In which they are sent."""
    offset: int
    """Bytes before them."""

    def of(self, data: torch.Tensor) -> torch.Tensor:
        """The rows in a chunk's bytes, as a view."""
        count = torch.Size(self.shape).numel() * self.dtype.itemsize
        return data[self.offset : self.offset + count].view(self.dtype).view(self.shape)


class Chunk(NamedTuple):
    """One object in the store."""

    pieces: tuple[Piece, ...]
    data: np.ndarray
    """(bytes,) uint8; read-only where it comes from the store."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one process has to give of some weights."""

    chunks: tuple[ray.ObjectRef, ...]
    """Each to a ``Chunk``."""
    bytes: int
    """Of all chunks."""


@dataclass(frozen=True, kw_only=True)
class WeightsRef:
    """Weights that a piece is to be done under, where every worker can read them."""

    tag: tuple[str, int]
    """Kind and version: whoever holds weights of this tag needs no others."""
    manifests: tuple[ray.ObjectRef, ...]
    """Each to a ``Manifest``: one for each process that publishes a part of them."""


# --- who publishes --------------------------------------------------------------------------------


def publish(
    rows: Iterable[Rows], rounded: Collection[str] = frozenset(), *, limit: int = CHUNK_BYTES
) -> ray.ObjectRef:
    """Puts rows into the store of this node and returns the reference of their ``Manifest``.

    Tensors named in ``rounded`` are sent in bfloat16, others as they are. A chunk is put while the
    next one is packed (on a GPU: cast there, and copied to the host), so the host's memory holds
    two of them. Raises what ``ray.put`` raises.
    """
    chunks: list[ray.ObjectRef] = []
    size = 0
    buffers: deque[torch.Tensor] = deque(torch.empty(0, dtype=torch.uint8) for _ in range(2))
    puts: deque[Future[ray.ObjectRef]] = deque()
    with ThreadPoolExecutor(1, "put") as pool:
        for pieces, parts in split(rows, rounded, limit):
            # the buffer of the chunk before the last one is free once that is in the store
            if len(puts) == len(buffers):
                chunks.append(puts.popleft().result())
            length = end_of(pieces[-1])
            buffers.append(_buffer(buffers.popleft(), length, parts[0].device))
            data = buffers[-1][:length]
            pack(pieces, parts, data)
            puts.append(pool.submit(ray.put, Chunk(pieces, data.numpy())))
            size += length
        chunks += [put.result() for put in puts]
    return ray.put(Manifest(chunks=tuple(chunks), bytes=size))


def split(
    rows: Iterable[Rows], rounded: Collection[str], limit: int
) -> Iterator[tuple[tuple[Piece, ...], list[torch.Tensor]]]:
    """For each chunk of at most ``limit`` bytes its pieces, and the rows that belong there. A row
    that is larger has a chunk of its own."""
    pieces: list[Piece] = []
    parts: list[torch.Tensor] = []
    offset = 0
    for name, tensor, first in rows:
        dtype = torch.bfloat16 if name in rounded else tensor.dtype
        count = len(tensor) if tensor.ndim else 1
        row_bytes = max(1, tensor.numel() * dtype.itemsize // max(1, count))
        done = 0
        while done < count:
            room = (limit - offset) // row_bytes
            if room < 1 and pieces:
                yield tuple(pieces), parts
                pieces, parts, offset = [], [], 0
                continue

            # as many rows as there is room for, one at least
            taken = min(max(room, 1), count - done)
            part = tensor[done : done + taken] if tensor.ndim else tensor
            pieces.append(Piece(name, first + done, tuple(part.shape), dtype, offset))
            parts.append(part)
            offset = -(-end_of(pieces[-1]) // ALIGNMENT) * ALIGNMENT
            done += taken
    if pieces:
        yield tuple(pieces), parts


def end_of(piece: Piece) -> int:
    return piece.offset + torch.Size(piece.shape).numel() * piece.dtype.itemsize


def _buffer(last: torch.Tensor, length: int, device: torch.device) -> torch.Tensor:
    """Bytes on the host, those of ``last`` where they suffice; pinned for a GPU to write to."""
    if len(last) >= length:
        return last
    return torch.empty(length, dtype=torch.uint8, pin_memory=device.type == "cuda")


@torch.no_grad()
def pack(pieces: Sequence[Piece], parts: Sequence[torch.Tensor], data: torch.Tensor) -> None:
    """Writes rows to their places in a chunk's bytes on the host."""
    device = parts[0].device
    there = data if device.type == "cpu" else torch.empty_like(data, device=device)
    for piece, part in zip(pieces, parts, strict=True):
        piece.of(there).copy_(part)
    if there is not data:
        data.copy_(there)


# --- who reads ------------------------------------------------------------------------------------


def expect(manifests: Sequence[Manifest]) -> None:
    """Has the chunks brought to this node by and by, and does not wait for them."""
    chunks = _ordered_here(manifests)
    if chunks:
        threading.Thread(target=_bring, args=[chunks], daemon=True).start()


def _bring(chunks: Sequence[ray.ObjectRef]) -> None:
    with contextlib.suppress(Exception):  # what is lost is said to who takes it over
        for start in range(0, len(chunks), AT_ONCE):
            some = list(chunks[start : start + AT_ONCE])
            ray.wait(some, num_returns=len(some), fetch_local=True)


def _ordered_here(manifests: Sequence[Manifest]) -> list[ray.ObjectRef]:
    chunks = list(chain.from_iterable(one.chunks for one in manifests))
    return in_order_of(ray.get_runtime_context().get_node_id(), chunks) if chunks else []


def in_order_of(node: str, chunks: Sequence[Asked]) -> list[Asked]:
    """The chunks in an order of the node's own: nodes that begin at the same time have different
    ones soon, and Ray brings a node what any other one has."""
    numbered = sorted(
        range(len(chunks)), key=lambda n: hashlib.sha256(f"{node} {n}".encode()).digest()
    )
    return [chunks[number] for number in numbered]


def receive(manifests: Sequence[Manifest], device: str = "cpu") -> Iterator[Rows]:
    """The rows of all chunks, each waited for when its turn comes while later ones are on their
    way. They are views of memory that is shared, or used again: copy them, and keep none.

    Raises what ``ray.get`` raises: ObjectLostError where the publisher or its node is gone.
    """
    expect(manifests)
    for ref in _ordered_here(manifests):
        chunk: Chunk = ray.get(ref)
        yield from _rows_of(chunk, device)


def _rows_of(chunk: Chunk, device: str) -> Iterator[Rows]:
    with warnings.catch_warnings():  # of memory that cannot be written to; nobody does
        warnings.simplefilter("ignore")
        data = torch.from_numpy(chunk.data)
    data = data.to(device)
    for piece in chunk.pieces:
        yield Rows(piece.name, piece.of(data), piece.first)


def receive_tensors(manifests: Sequence[Manifest]) -> dict[str, torch.Tensor]:
    """Whole tensors by name, on the CPU, for who cannot take them over in parts."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, tensor, first in receive(manifests):
        parts.setdefault(name, []).append((first, tensor.clone()))
    found = {}
    for name, some in parts.items():
        ordered = [tensor for _, tensor in sorted(some, key=lambda part: part[0])]
        found[name] = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
    return found
