"""Files of tensors that several processes hold: whole tensors and rows come back to the last bit,
and every kind of damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlalign.core.registry import UserError
from rlalign.learning import shard_files
from rlalign.learning.shard_files import Piece, ShardFiles, write_file

TENSORS = {
    "policy/rows": torch.randn(5, 3),
    "policy/half": torch.randn(2, 4).bfloat16(),
    "policy/flags": torch.tensor([True, False, True]),
    "optimiser/step/rows": torch.tensor(7.0),
    "version": torch.tensor(12),
}


def cut(rank: int, count: int) -> dict[Piece, torch.Tensor]:
    """What process ``rank`` of ``count`` holds: its rows, and the first one all that has none."""
    found = {}
    for name, tensor in TENSORS.items():
        if not tensor.ndim and rank:
            continue
        first = 0
        rows = tensor
        if tensor.ndim:
            size = -(-len(tensor) // count)
            first = rank * size
            rows = tensor[first : first + size]
        if rows.numel():
            offsets = (first, *[0] * (tensor.ndim - 1)) if tensor.ndim else ()
            piece = Piece(name=name, offsets=offsets, shape=tuple(rows.shape), dtype=rows.dtype)
            found[piece] = rows
    return found


def write(folder: Path, count: int) -> dict[str, str]:
    """The files of so many processes, as they would write them."""
    heads = {}
    for rank in range(count):
        pieces = cut(rank, count)
        name = f"shard-{rank}.safetensors"
        heads[name] = write_file(folder / name, list(pieces), pieces.__getitem__)
    return heads


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_whole_tensors_and_rows_come_back_to_the_last_bit(tmp_path: Path, count: int) -> None:
    found = ShardFiles(tmp_path, write(tmp_path, count))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        for first in range(len(tensor) if tensor.ndim else 0):
            for end in range(first, len(tensor) + 1):
                assert torch.equal(found.rows(name, first, end), tensor[first:end])


def test_other_libraries_read_a_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write(tmp_path, 2)
    found = load_file(tmp_path / "shard-1.safetensors")
    assert found.keys() == {"policy/rows", "policy/half", "policy/flags"}
    assert torch.equal(found["policy/rows"], TENSORS["policy/rows"][3:])


def test_large_tensors_are_hashed_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file and the same numbers, whatever is read at once."""
    whole = write(tmp_path, 1)
    monkeypatch.setattr(shard_files, "_PIECE", 8)
    assert write(tmp_path, 1) == whole
    found = ShardFiles(tmp_path, whole)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    """In a head when the files are opened, in a tensor when it is read; the others are read."""
    heads = write(tmp_path, 2)
    file = tmp_path / "shard-0.safetensors"
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    for place in (0, 9, length - 30, length, len(whole) - 1):
        blob = bytearray(whole)
        blob[place] ^= 1
        file.write_bytes(bytes(blob))
        with pytest.raises(UserError, match=r"is damaged: .*shard-0\S* does not match.*delete "):
            list(ShardFiles(tmp_path, heads).values())
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        list(ShardFiles(tmp_path, heads).values())
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="is damaged"):
        list(ShardFiles(tmp_path, heads).values())
    file.unlink()
    with pytest.raises(UserError, match="is incomplete: shard-0.safetensors is missing"):
        ShardFiles(tmp_path, heads)


def test_nothing_is_pickled() -> None:
    source = Path(shard_files.__file__).read_text(encoding="utf-8")
    assert "pickle" not in source
    assert "torch.load" not in source
    assert "torch.save" not in source
