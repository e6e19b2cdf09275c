"""Rewritten safetensors files: numbers, metadata, sizes beside them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlalign.core.registry import UserError
from rlalign.networks.exports import Rounding, rewrite, rewrite_folder

NOTE = {"rlalign": '{"name": "a run"}', "a": "b"}


def tensors() -> dict[str, torch.Tensor]:
    """Of several widths, so that a file of narrower ones has to lie otherwise."""
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(3, 5, generator=generator),
        "a.positions": torch.arange(7),
        "a.mask": torch.tensor([True, False, True]),
        "a.short": torch.arange(3, dtype=torch.int32),
        "c.alpha": torch.tensor(0.1),
        "c.empty": torch.zeros(0, 2),
        "c.weight": torch.randn(3, generator=generator).half(),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_are_those_of_a_cast(tmp_path: Path, dtype: str) -> None:
    """Scalars and whole numbers stay; the largest difference is told with its tensor."""
    file = tmp_path / "x.safetensors"
    save_file(tensors(), file, metadata={"format": "pt"})
    rounding = rewrite(file, dtype, NOTE)
    kind = getattr(torch, dtype)
    found = load_file(file)
    cast = {"b.weight", "c.empty", "c.weight"}
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        expected = tensor.to(kind) if name in cast else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    original = tensors()["b.weight"]
    moved = (original.to(kind).float() - original).abs().max().item()
    assert rounding.difference == moved
    assert rounding == Rounding() or rounding.name == "b.weight"
    assert (moved > 0) == (dtype != "float32")
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", **NOTE}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_same_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    """Also where the library wrote the metadata in another order."""
    contents = set[bytes]()
    for number in range(6):
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors(), file, metadata={f"key {n}": str(n) for n in range(8)})
        rewrite(file, "bfloat16", NOTE)
        contents.add(file.read_bytes())
    assert len(contents) == 1


def test_indices_and_configs_say_the_new_sizes_and_dtype(tmp_path: Path) -> None:
    """Whole pipelines: shards with their index, and what transformers' configs say."""
    part = tmp_path / "unet"
    part.mkdir()
    weights = {"one": torch.ones(4), "two": torch.full((3, 2), 1 / 3)}
    for name, tensor in weights.items():
        save_file({name: tensor}, part / f"{name}.safetensors")
    index = {
        "metadata": {"total_size": 40},
        "weight_map": {name: f"{name}.safetensors" for name in weights},
    }
    (part / "x.safetensors.index.json").write_text(json.dumps(index))
    (part / "config.json").write_text('{"dtype": "float32", "width": 4}')
    rounding = rewrite_folder(tmp_path, "float16", {})
    assert rounding.name == "unet: two"
    found = json.loads((part / "x.safetensors.index.json").read_text())
    assert found == {**index, "metadata": {"total_size": 20}}
    assert json.loads((part / "config.json").read_text()) == {"dtype": "float16", "width": 4}


def test_a_number_beyond_the_range_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.tensor([1.0, 7e4])}, file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="the largest of a is 70000, got float16; take bfloat16"):
        rewrite(file, "float16", {})
    assert file.read_bytes() == before
    assert rewrite(file, "bfloat16", {}).difference > 0
