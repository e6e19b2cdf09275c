"""Weights in chunks: what is in them, and what comes out of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlalign.runtime import weights
from rlalign.runtime.weights import Rows


def tensors() -> dict[str, torch.Tensor]:
    """Of several kinds and sizes, one of them larger than a chunk and one of no dimensions."""
    generator = torch.Generator().manual_seed(0)
    return {
        "small": torch.randn(3, 5, generator=generator),
        "large": torch.randn(100, 7, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "wide": torch.randn(2, 400, generator=generator),
        "empty": torch.zeros(0, 4),
        "double": torch.randn(9, generator=generator, dtype=torch.float64),
        "count": torch.arange(4),
    }


def through_chunks(
    rows: list[Rows], rounded: set[str], limit: int
) -> tuple[list[Rows], list[torch.Tensor]]:
    """(what comes out, the bytes of each chunk)."""
    found, chunks = list[Rows](), list[torch.Tensor]()
    for pieces, parts in weights.split(rows, rounded, limit):
        data = torch.empty(weights.end_of(pieces[-1]), dtype=torch.uint8)
        weights.pack(pieces, parts, data)
        chunks.append(data)
        found += [Rows(piece.name, piece.of(data), piece.first) for piece in pieces]
    return found, chunks


@pytest.mark.parametrize("limit", [1, 200, 1000, 10**6])
def test_chunks_are_bounded_and_hold_every_row_once(limit: int) -> None:
    given, rounded = tensors(), {"large", "scalar"}
    found, chunks = through_chunks(Rows.of(given), rounded, limit)
    widest = given["wide"][0].nbytes
    assert max(map(len, chunks)) <= max(limit, widest)
    assert len(chunks) == 1 if limit == 10**6 else len(chunks) > 2
    for name, tensor in given.items():
        own = [row for row in found if row.name == name]
        wanted = tensor.bfloat16() if name in rounded else tensor
        if not tensor.ndim:
            assert [(row.first, row.tensor) for row in own] == [(0, wanted)]
            continue
        assert [row.first for row in own] == [
            0,
            *np.cumsum([len(row.tensor) for row in own])[:-1],
        ] or not len(tensor)
        parts = [row.tensor for row in own]
        assert torch.equal(torch.cat([wanted[:0], *parts]), wanted)
        assert all(part.dtype == wanted.dtype for part in parts)


def test_who_holds_some_rows_says_which() -> None:
    """As a process does that has a part of a tensor."""
    whole = torch.arange(40.0).reshape(20, 2)
    found, _ = through_chunks([Rows("w", whole[12:], 12)], set(), 24)
    assert [row.first for row in found] == [12, 15, 18]
    for row in found:
        assert torch.equal(row.tensor, whole[row.first : row.first + len(row.tensor)])


@pytest.mark.ray
def test_what_is_published_is_received(ray_cluster: None) -> None:
    """In several chunks, by two who publish, and rounded where that was said."""
    import ray

    given = tensors()
    del given["empty"]
    whole = given.pop("large")
    refs = [
        weights.publish([*Rows.of(given), Rows("large", whole[60:], 60)], {"wide"}, limit=300),
        weights.publish([Rows("large", whole[:60])], limit=300),
    ]
    manifests: list[Any] = ray.get(refs)
    assert all(len(manifest.chunks) > 3 for manifest in manifests)
    chunks: list[Any] = [ray.get(ref) for manifest in manifests for ref in manifest.chunks]
    sizes = [len(chunk.data) for chunk in chunks]
    assert sum(manifest.bytes for manifest in manifests) == sum(sizes)
    assert max(sizes) <= max(300, given["wide"].bfloat16()[0].nbytes)
    found = weights.receive_tensors(manifests)
    wanted = {**given, "large": whole, "wide": given["wide"].bfloat16()}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


@pytest.mark.ray
def test_no_weights_are_a_version_too(ray_cluster: None) -> None:
    import ray

    manifest = ray.get(weights.publish([]))
    assert (manifest.chunks, manifest.bytes) == ((), 0)
    assert weights.receive_tensors([manifest]) == {}


def test_each_node_asks_for_all_chunks_in_an_order_of_its_own() -> None:
    """Of 64 nodes that begin at once with 2 of 90 chunks most begin with different ones: 64 drawn
    of 90 are 46 different on average, and fewer than 35 in less than one of a thousand draws."""
    chunks = list(range(90))
    orders = [weights.in_order_of(f"node {number}", chunks) for number in range(64)]
    assert all(sorted(order) == chunks for order in orders)
    assert orders[0] == weights.in_order_of("node 0", chunks)
    assert len({order[0] for order in orders}) > 35
