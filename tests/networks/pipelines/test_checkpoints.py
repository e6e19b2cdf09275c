"""Weights in one file, with the folder of their settings beside it, against the folder that they
come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlalign.alignment.models import find_model
from rlalign.core.registry import UserError
from rlalign.networks.pipelines.checkpoints import read_network
from rlalign.policies.base import Policy
from rlalign.policies.sd3 import StableDiffusion3
from rlalign.policies.stable_diffusion import StableDiffusion
from tests.networks.pipelines.originals import save_original
from tests.toy import save_flow_pipeline, save_pipeline

FAMILIES = {"stable_diffusion": StableDiffusion, "sd3": StableDiffusion3}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name of the policy, a pipeline folder, the file of the same weights)."""
    import diffusers

    place = tmp_path_factory.mktemp(request.param)
    folder = place / "pipeline"
    if request.param == "stable_diffusion":
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            save_pipeline(folder), safety_checker=None
        )
    else:
        save_flow_pipeline(folder)
        widen_second_encoder(folder)
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, text_encoder_3=None, tokenizer_3=None
        )
    return request.param, folder, save_original(pipeline, place)


def widen_second_encoder(folder: Path) -> None:
    """Text encoders of two widths, by which diffusers tells them apart, the first of them without a
    projection, as Stable Diffusion 3's."""
    import transformers

    for part, width, projection in (("text_encoder", 16, 16), ("text_encoder_2", 24, 8)):
        config = transformers.CLIPTextConfig.from_pretrained(folder / part)
        config.update({"hidden_size": width, "projection_dim": projection})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(width)
            encoder = transformers.CLIPTextModelWithProjection(config)
        if width == projection:
            encoder.text_projection.weight.data = torch.eye(width)
        encoder.save_pretrained(folder / part)


def assert_same(one: Policy, other: Policy) -> None:
    """Every weight of every part, and a picture."""
    parts = one.family.parts()
    assert parts.keys() == other.family.parts().keys()
    for part, module in parts.items():
        theirs = other.family.parts()[part].state_dict()
        assert theirs.keys() == module.state_dict().keys()
        for name, tensor in module.state_dict().items():
            assert torch.equal(theirs[name], tensor), (part, name)
    drawn = [policy.sample(["a red circle"], steps=2, guidance=2.0) for policy in (one, other)]
    assert torch.equal(*drawn)


@pytest.mark.promise
def test_one_file_is_the_folder_that_it_was_made_of(saved: Any) -> None:
    name, folder, file = saved
    recipe = FAMILIES[name]
    assert_same(recipe(path=str(folder)).load("cpu"), recipe(path=str(file)).load("cpu"))


def test_the_class_of_one_file_is_that_of_its_settings(saved: Any) -> None:
    name, _, file = saved
    model = find_model(str(file))
    assert model.recipe.name == name
    other = "sd3" if name == "stable_diffusion" else "stable_diffusion"
    with pytest.raises(UserError, match=r"_class_name in model_index\.json must be Stable.*, got"):
        FAMILIES[other](path=str(file)).load("cpu")


def test_an_adapter_of_one_file_in_bfloat16_is_that_of_the_folder(saved: Any) -> None:
    name, folder, file = saved
    settings = {"lora_rank": 2, "precision": "bfloat16"}
    policies = [FAMILIES[name](path=str(p), **settings).load("cpu") for p in (folder, file)]
    assert_same(*policies)


def test_the_denoiser_is_read_again_in_float32(saved: Any) -> None:
    """Of a folder and of one file, bit for bit; and so is a merged policy that computes in
    bfloat16, where no adapter is."""
    name, folder, file = saved
    recipe = FAMILIES[name]
    family: Any = recipe.family
    exact = recipe(path=str(folder)).load("cpu").network.state_dict()
    for path in (str(folder), str(file)):
        found = read_network(path, family.pipeline_classes, family.part).state_dict()
        assert found.keys() == exact.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in exact.items())
        policy = recipe(path=path, precision="bfloat16", lora_rank=2).load("cpu")
        merged = policy.merged().network.state_dict()
        assert merged.keys() == exact.keys()
        assert all(torch.equal(merged[key], tensor) for key, tensor in exact.items())


def test_a_text_encoder_may_lie_in_the_folder(saved: Any, tmp_path: Path) -> None:
    name, folder, _ = saved
    recipe = FAMILIES[name]
    whole = recipe(path=str(folder)).load("cpu")
    file = save_original(
        whole.family.pipeline, tmp_path, without=("text_encoder", "text_encoder_2")
    )
    assert_same(whole, recipe(path=str(file)).load("cpu"))


def test_an_autoencoder_may_lie_in_the_folder(saved: Any, tmp_path: Path) -> None:
    name, folder, _ = saved
    recipe = FAMILIES[name]
    whole = recipe(path=str(folder)).load("cpu")
    file = save_original(whole.family.pipeline, tmp_path, without=("vae",))
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith("first_stage")}
    save_file(tensors, file)
    assert_same(whole, recipe(path=str(file)).load("cpu"))


def test_a_file_without_settings_is_told_what_to_put_where(saved: Any, tmp_path: Path) -> None:
    name, _, file = saved
    alone = Path(shutil.copy(file, tmp_path / "alone.safetensors"))
    wanted = rf"lack the settings .* there is no {tmp_path}/alone/model_index\.json; copy there"
    with pytest.raises(UserError, match=wanted):
        FAMILIES[name](path=str(alone)).load("cpu")
    with pytest.raises(UserError, match=wanted):
        find_model(str(alone))


def test_what_the_file_lacks_is_not_invented(saved: Any, tmp_path: Path) -> None:
    name, _, file = saved
    copy = Path(shutil.copy(file, tmp_path / file.name))
    shutil.copytree(file.with_suffix(""), copy.with_suffix(""))
    tensors = load_file(file)
    missing = next(n for n in tensors if n.startswith("first_stage_model.decoder.conv_in"))
    save_file({n: t for n, t in tensors.items() if n != missing}, copy)
    with pytest.raises(UserError, match=r"it lacks a weight of the vae, which .*config\.json asks"):
        FAMILIES[name](path=str(copy)).load("cpu")

    missing = next(n for n in tensors if n.endswith("layers.0.self_attn.k_proj.weight"))
    save_file({n: t for n, t in tensors.items() if n != missing}, copy)
    with pytest.raises(UserError, match=r"it lacks \S*k_proj\.weight of the text_encoder"):
        FAMILIES[name](path=str(copy)).load("cpu")

    part = "unet" if name == "stable_diffusion" else "transformer"
    config = copy.with_suffix("") / part / "config.json"
    wider = json.loads(config.read_text()) | {"in_channels": 6}
    config.write_text(json.dumps(wider))
    save_file(tensors, copy)
    with pytest.raises(UserError, match=rf"cannot load .*model\.safetensors': {part}: "):
        FAMILIES[name](path=str(copy)).load("cpu")
