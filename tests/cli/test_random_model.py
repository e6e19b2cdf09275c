"""``rlalign random-model``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlalign.cli import main
from rlalign.networks.random_models import FAMILIES, count_folder


def test_a_small_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "new"
    assert main(["random-model", "flux-schnell", str(folder)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "FLUX.1-schnell, tiny: FluxPipeline"
    counts = count_folder(folder)
    for line, part in zip(lines[1:5], FAMILIES["flux_schnell"].networks, strict=True):
        assert line.split()[0] == part
        assert f" {counts[part]:,} parameters" in line
    assert lines[5].split() == ["all", f"{sum(counts.values()):,}", "parameters"]
    assert lines[6].endswith(" kB on disk; tokenizers read letter by letter")
    assert lines[7] == f"{folder}: DiffusionPipeline.from_pretrained({str(folder)!r}) loads it"
    assert len(lines) == 8
    assert err == ""
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors").is_file()


def test_configs_of_the_published_size(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "new"
    arguments = ["sdxl", str(folder), "--size", "published", "--without-weights"]
    assert main(["random-model", *arguments]) == 0
    out = capsys.readouterr().out
    assert " 2,567,463,684 parameters     5.1 GB" in out
    assert out.splitlines()[-1] == "without weights; tokenizers read letter by letter"
    assert list(folder.rglob("*.safetensors")) == []
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["force_zeros_for_empty_prompt"] is True


def test_an_unknown_family_lists_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["random-model", "sd4", str(tmp_path / "new")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "got 'sd4'" in err
    assert err.endswith(f"known: {', '.join(FAMILIES)}\n")
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_in_it_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["random-model", "sdxl", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is not empty; name another folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_size_and_a_disk_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["random-model", "flux", str(tmp_path / "new"), "--size", "huge"]) == 2
    message = "error: --size must be tiny or published, got 'huge'\n"
    assert capsys.readouterr().err == message
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=5_000_000_000))
    assert main(["random-model", "flux", str(tmp_path / "new"), "--size", "published"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "the weights take 33.7 GB and the disk has 5.0 GB left" in err
    assert not (tmp_path / "new").exists()
