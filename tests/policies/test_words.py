"""Where the words of prompts come from: the same numbers from text encoders here, from a file and
from another process; and which parts of a checkpoint a process then holds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlalign.alignment.assemble import build_learner
from rlalign.alignment.encode import encode_prompts
from rlalign.alignment.words import encoding_reader
from rlalign.cli.check.memory import measure_load, weights_of
from rlalign.config import RuntimeSettings
from rlalign.core.records import Plan
from rlalign.core.registry import UserError, build
from rlalign.diffusion.rollout import rollout
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.base import LATENTS, Policy
from tests.policies.family_runs import PATHS, run_of
from tests.toy import PROMPTS, make_units

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "flux": ({"text_tokens": 16}, "flow"),
    "sd35": ({"name": "sd3", "t5_tokens": 16}, "flow"),
    "sdxl": ({}, "epsilon"),
}
"""Random model -> settings of its policy, and its prediction type."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in SETTINGS}
    for name, folder in made.items():
        write_pipeline(folder, FAMILIES[name], seed=1)
    return made


@pytest.fixture(scope="module")
def files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The words of four prompts by each model."""
    place = tmp_path_factory.mktemp("words")
    made = {name: place / f"{name}.safetensors" for name in folders}
    for name, file in made.items():
        assert encode_prompts(recipe_of(name, folders[name]), PROMPTS, file, "cpu").new == 5
    return made


def recipe_of(name: str, folder: Path, **more: Any) -> Any:
    settings = {"name": name, "path": str(folder), "negative_prompt": PROMPTS[0]}
    return build("policies", {**settings, **SETTINGS[name][0], **more})


def without_weights(folder: Path, copy: Path, part: str) -> Path:
    """A copy of a pipeline folder whose parts of this name have configs alone."""
    shutil.copytree(folder, copy)
    lost = list(copy.glob(f"{part}*/*.safetensors"))
    assert lost
    for file in lost:
        file.unlink()
    return copy


def drawn(policy: Policy, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Latents and pictures of a unit, with guidance."""
    plan = Plan(steps=2, guidance=2.0, height=16, width=16, **PATHS[SETTINGS[name][1]])
    trajectory, media = rollout(policy, make_units(1, plan=plan)[0], 0)
    return trajectory.latents_BK1, media


@pytest.mark.parametrize("name", SETTINGS)
def test_rollouts_are_the_same_bit_for_bit(
    name: str, folders: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    """With words from a file, on a folder without weights of text encoders, and from a reader."""
    whole = recipe_of(name, folders[name]).load("cpu")
    latents, media = drawn(whole, name)

    # a file
    bare = without_weights(folders[name], tmp_path / "bare", "text_encoder")
    from_file = recipe_of(name, bare, embeddings=str(files[name])).load("cpu")
    assert set(from_file.family.parts()) == {from_file.family.part, "vae"}
    # another process, or this one in its place
    recipe = recipe_of(name, folders[name], embeddings="actor")
    reader = encoding_reader(recipe, RuntimeSettings())
    assert reader is not None
    from_reader = recipe.load("cpu", reader=reader)
    assert set(from_reader.family.parts()) == {from_reader.family.part, "vae"}

    for policy in (from_file, from_reader):
        found, pictures = drawn(policy, name)
        assert np.array_equal(found, latents)
        assert np.array_equal(pictures, media)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_learner_holds_the_denoiser_alone(
    name: str, folders: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    """And needs no weights of other parts on its machine."""
    bare = without_weights(folders[name], tmp_path / "encoders", "text_encoder")
    bare = without_weights(bare, tmp_path / "bare", "vae")
    policy = recipe_of(name, bare, embeddings=str(files[name])).model_dump()
    run = run_of(policy, PATHS[SETTINGS[name][1]], {"name": "grpo"})
    family: Any = build_learner(run).policy.family
    assert set(family.parts()) == {family.part}
    for part, network in family.pipeline.components.items():
        if isinstance(network, torch.nn.Module):
            assert any(p.is_meta for p in network.parameters()) == (part != family.part)


def test_a_learner_has_the_autoencoder_where_its_algorithm_sees_pictures(
    folders: dict[str, Path], files: dict[str, Path]
) -> None:
    policy = recipe_of("flux", folders["flux"], embeddings=str(files["flux"])).model_dump()
    draft = {"name": "reward_backprop", "last_steps": 1}
    run = run_of(policy, PATHS["flow"], draft, "bradley_terry")
    assert set(build_learner(run).policy.family.parts()) == {"transformer", "vae"}


def test_without_an_autoencoder_nothing_is_decoded(
    folders: dict[str, Path], files: dict[str, Path]
) -> None:
    recipe = recipe_of("flux", folders["flux"], embeddings=str(files["flux"]))
    policy = recipe.load("cpu", parts=LATENTS)
    plan = Plan(height=16, width=16)
    with pytest.raises(UserError, match="sees_media"):
        policy.decode(torch.zeros(1, *policy.latent_shape(plan)))
    with pytest.raises(UserError, match="sees_media"):
        policy.encode_media(torch.zeros(1, 1, 3, 16, 16))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_process_without_the_other_parts_saves_them_too(
    name: str, folders: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    """The pipeline folder of all weights: the same tensors in the same files."""
    recipe_of(name, folders[name]).load("cpu").save(tmp_path / "whole")
    recipe = recipe_of(name, folders[name], embeddings=str(files[name]))
    recipe.load("cpu", parts=LATENTS).save(tmp_path / "part")
    mine, theirs = (
        {f.relative_to(tmp_path / kind): f for f in (tmp_path / kind).rglob("*") if f.is_file()}
        for kind in ("part", "whole")
    )
    assert mine.keys() == theirs.keys()
    weights = [file for file in mine if file.suffix == ".safetensors"]
    assert len(weights) == {"flux": 4, "sd35": 5, "sdxl": 4}[name]
    for file in weights:
        found, wanted = load_file(mine[file]), load_file(theirs[file])
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    for file in ("model_index.json", "vae/config.json", "text_encoder/config.json"):
        assert mine[Path(file)].read_text() == theirs[Path(file)].read_text()


def test_what_parts_hold_is_counted(folders: dict[str, Path], files: dict[str, Path]) -> None:
    """What loading without parts leaves in memory is what loading leaves, less the parts."""
    recipe = recipe_of("flux", folders["flux"])
    whole, loaded = measure_load(lambda: recipe.load("cpu"))
    from_file = recipe.model_copy(update={"embeddings": str(files["flux"])})
    _, held = measure_load(lambda: from_file.load("cpu", parts=LATENTS))
    role_of = whole.family.role_of
    without = sum(n for name, n in weights_of(whole).items() if role_of(name) != "denoiser")
    assert without > 100_000
    # words that are remembered, and tables of positions, differ by little
    assert abs(loaded - without - held) < 0.1 * without


# --- what is refused -----------------------------------------------------------------------------


def test_a_file_of_other_text_encoders_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """Other weights, another setting; what a family of its own says beside the words may differ."""
    write_pipeline(tmp_path, FAMILIES["flux"], seed=2)
    file = str(files["flux"])
    with pytest.raises(UserError, match=r"another text_encoder \(weights\)"):
        recipe_of("flux", tmp_path, embeddings=file).load("cpu")


def test_a_file_under_another_setting_is_refused(
    folders: dict[str, Path], files: dict[str, Path]
) -> None:
    """Where the words depend on it, and where they do not it is read."""
    file = str(files["flux"])
    recipe = recipe_of("flux", folders["flux"], embeddings=file, text_tokens=12)
    with pytest.raises(UserError, match=r"policy\.text_tokens: 16, and not 12"):
        recipe.load("cpu")
    recipe_of("flux", folders["flux"], embeddings=file, embedded_guidance=1.0).load("cpu")


def test_a_setting_that_names_no_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"policies\.embeddings must be empty, actor, or a"):
        build("policies", {"name": "flux", "path": "x", "embeddings": "file"})


def test_what_has_no_text_encoders_is_not_encoded(tmp_path: Path) -> None:
    recipe: Any = build("policies", {"name": "points"})
    with pytest.raises(UserError, match=r"policy\.name must be one of a diffusers pipeline"):
        encode_prompts(recipe, PROMPTS, tmp_path / "words.safetensors", "cpu")
