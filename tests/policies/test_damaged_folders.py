"""A pipeline folder of every family with one thing wrong in it: one message that names the place,
and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.alignment.models import find_model
from rlalign.cli import main
from rlalign.core.registry import UserError
from rlalign.networks.random_models import FAMILIES, write_pipeline
from tests.policies import damage

NAMES = (
    "flux",
    "flux2",
    "cogvideox",
    "hunyuan_video",
    "ltx",
    "pixart",
    "qwen_image",
    "sana",
    "sd3",
    "sdxl",
    "stable_diffusion",
    "wan",
    "z_image",
)
"""A random model of every family of pipelines."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    for name in NAMES:
        write_pipeline(home / name, FAMILIES[name], seed=1)
    return {name: home / name for name in NAMES}


def parts_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def damaged(
    folder: Path, home: Path, *, share: int = 0, among: int = 1
) -> Iterator[tuple[str, str, Path]]:
    """(part, what is wrong with it, copy) of everything that can be wrong with a folder, or of
    every ``among``-th of it from ``share`` on."""
    harms = [(part, *harm) for part in parts_of(folder) for harm in damage.damages_of(part).items()]
    for number, (part, title, harm) in enumerate(harms[share::among]):
        copy = damage.copy_linked(folder, home / str(number))
        harm(copy / part)
        yield part, title, copy


def refusal_of(copy: Path, *, loads: bool) -> str:
    """What is said of a folder when a command announces its policy, or when that is loaded; empty
    where nothing is."""
    recipe: Any = find_model(str(copy)).recipe
    try:
        recipe.load("cpu") if loads else recipe.announce()
    except UserError as error:
        return str(error)
    return ""


def assert_one_message(said: str, part: str, copy: Path) -> None:
    assert said.startswith("policy.path: cannot ")
    assert "\n" not in said
    assert str(copy) in said
    assert part in said or "`Nowhere`" in said
    assert said.rpartition("; ")[2].startswith(("is the folder", "name "))


@pytest.mark.promise
@pytest.mark.parametrize("name", NAMES)
def test_what_its_files_tell_is_refused_before_anything_is_loaded(
    name: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the name of the part; weights that may not be asked for need not be there."""
    denoiser = "unet" if (folders[name] / "unet").exists() else "transformer"
    for part, title, copy in damaged(folders[name], tmp_path):
        said = refusal_of(copy, loads=False)
        optional = title in ("no weights", "pickled weights") and part != denoiser
        if title in damage.ONLY_LOADED or title == "a vocabulary without words" or optional:
            assert not said, f"{part}, {title}: {said}"
            continue
        assert said, f"{part}, {title}"
        assert_one_message(said, part, copy)
        assert f" {part}" in said
    capsys.readouterr()


def refused_when_loaded(folder: Path, home: Path, *, share: int, among: int) -> None:
    for part, title, copy in damaged(folder, home, share=share, among=among):
        if may_be_left_out(part, title):
            continue
        said = refusal_of(copy, loads=True)
        assert said, f"{part}, {title}"
        assert_one_message(said, part, copy)


def may_be_left_out(part: str, title: str) -> bool:
    """Stable Diffusion 3 does without T5."""
    return (part, title) == ("text_encoder_3", "left out")


@pytest.mark.promise
@pytest.mark.parametrize("name", NAMES)
def test_it_is_refused_when_it_is_loaded(
    name: str, folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A share of what can be wrong, another one in each family; the libraries print nothing."""
    share = NAMES.index(name)
    refused_when_loaded(folders[name], tmp_path, share=share, among=len(NAMES))
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_of_it_is_refused_when_it_is_loaded(
    name: str, folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refused_when_loaded(folders[name], tmp_path, share=0, among=1)
    assert capfd.readouterr().err == ""


@pytest.mark.promise
@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_without_words_is_refused(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """transformers makes an empty one of missing files, and every prompt would read the same."""
    for part in parts_of(folders[name]):
        if not part.startswith("tokenizer"):
            continue
        for title in ("no vocabulary", "a vocabulary without words"):
            copy = damage.copy_linked(folders[name], tmp_path / f"{part}-{title}")
            damage.TOKENIZER[title](copy / part)
            assert_one_message(refusal_of(copy, loads=True), part, copy)


def test_merged_letters_need_both_of_their_files(folders: dict[str, Path], tmp_path: Path) -> None:
    """CLIP's as published folders have it."""
    whole = damage.copy_linked(folders["sdxl"], tmp_path / "whole")
    damage.plain_words(whole / "tokenizer")
    assert not refusal_of(whole, loads=True)
    for file in ("vocab.json", "merges.txt"):
        copy = damage.copy_linked(folders["sdxl"], tmp_path / file)
        damage.plain_words(copy / "tokenizer", without=file)
        assert_one_message(refusal_of(copy, loads=True), "", copy)


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_shards_and_variants_are_read(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Or their refusal would prove nothing: the same weights, however they lie."""
    wanted = find_model(str(folders[name])).load("cpu").family.parts()
    for number, change in enumerate((damage.split, damage.rename_variant)):
        copy = damage.copy_linked(folders[name], tmp_path / str(number))
        for part in wanted:
            change(copy / part)
        assert not refusal_of(copy, loads=False)
        found = find_model(str(copy)).load("cpu").family.parts()
        for part, network in wanted.items():
            states = network.state_dict(), found[part].state_dict()
            assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_an_index_of_a_variant_that_was_left_out_is_none(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """As where half of a repository was downloaded."""
    copy = damage.copy_linked(folders["flux"], tmp_path / "copy")
    for shard in damage.split(copy / "transformer", ".fp16"):
        shard.unlink()
    damage.split(damage.copy_linked(folders["flux"] / "transformer", tmp_path / "other"))
    for file in (tmp_path / "other").glob("*safetensors*"):
        file.rename(copy / "transformer" / file.name)
    assert not refusal_of(copy, loads=False)
    assert not refusal_of(copy, loads=True)


def test_what_is_not_read_need_not_be_there(folders: dict[str, Path], tmp_path: Path) -> None:
    """A safety checker that was left out of a download, and files that are hidden."""
    copy = damage.copy_linked(folders["stable_diffusion"], tmp_path / "copy")
    kind = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    damage.index_as(kind)(copy / "safety_checker")
    (copy / "unet" / "._config.json").write_bytes(b"\x00\x05\x16\x07")
    assert not refusal_of(copy, loads=False)
    assert not refusal_of(copy, loads=True)


# --- the command ---------------------------------------------------------------------------------


def run_file(model: Path, place: Path) -> Path:
    run = {
        "name": "a",
        "policy": {"name": "sdxl", "path": str(model)},
        "plan": {"steps": 2},
        "prompts": {"name": "list", "prompts": ["a", "b"], "per_round": 2, "per_unit": 1},
        "rewards": [{"name": "jpeg"}],
        "algorithm": {"name": "ddpo"},
        "learner": {"updates_per_round": 1},
    }
    place.write_text(json.dumps(run))
    return place


@pytest.mark.parametrize(
    ("part", "title", "local"),
    [
        ("unet", "a shard missing", False),  # no Ray is started for it
        ("tokenizer_2", "a vocabulary without words", True),
        ("text_encoder", "no weights", True),
    ],
)
def test_train_says_so_and_writes_nothing(
    folders: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    part: str,
    title: str,
    local: bool,
) -> None:
    copy = damage.copy_linked(folders["sdxl"], tmp_path / "model")
    damage.damages_of(part)[title](copy / part)
    file = run_file(copy, tmp_path / "run.yaml")
    command = ["train", str(file), "--out", str(tmp_path / "out"), *["--local"] * local]
    assert main(command) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len([line for line in said if line.startswith("error: ")]) == 1
    assert said[-1].startswith("error: policy.path: cannot load ")
    assert part in said[-1]
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_trains_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As ``random-model`` makes one for ``check``."""
    model = tmp_path / "model"
    assert main(["random-model", "sdxl", str(model), "--without-weights"]) == 0
    capfd.readouterr()
    file = run_file(model, tmp_path / "run.yaml")
    assert main(["train", str(file), "--out", str(tmp_path / "out")]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"error: policy.path: cannot load {str(model)!r}: unet has no weights")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_class_is_told_which_are_read(
    folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By every command that finds the policy of a folder by itself."""
    copy = damage.copy_linked(folders["sdxl"], tmp_path / "model")
    damage.rewrite_json(
        copy / "model_index.json", lambda index: {**index, "_class_name": "KandinskyPipeline"}
    )
    assert main(["evaluate", str(copy), "--out", str(tmp_path / "out")]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.endswith("got 'KandinskyPipeline'")
    for name in NAMES:
        assert f"{FAMILIES[name].pipeline} (" in said
    assert not (tmp_path / "out").exists()
