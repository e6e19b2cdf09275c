"""Where a pipeline is looked for, which of its files are read, and what is said where that
fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.alignment.models import find_model
from rlalign.core.registry import UserError
from rlalign.networks.pipelines.loading import variant_of
from rlalign.policies.sd3 import StableDiffusion3
from rlalign.policies.stable_diffusion import StableDiffusion
from tests.networks.pipelines.helpers import copy_of, edit
from tests.toy import save_flow_pipeline


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["config.json", "model.safetensors", "model.fp16.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], None),
        (["diffusion_pytorch_model.fp16.safetensors"], "fp16"),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], "fp16"),
        (["diffusion_pytorch_model-00001-of-00002.fp16.safetensors"], "fp16"),
        (["model.bf16.safetensors", "model.fp16.safetensors"], "fp16"),
        (["model.bf16.safetensors", "model.fp32.safetensors"], "fp32"),
        (["model.non_ema.safetensors"], "non_ema"),
        (["config.json", "vocab.json"], None),
    ],
)
def test_the_variant_is_read_off_the_names_of_files(names: list[str], variant: str | None) -> None:
    assert variant_of(names) == variant


@pytest.mark.parametrize(
    ("family", "variant", "size"),
    [
        ("stable_diffusion", "fp16", None),
        ("stable_diffusion", "bf16", "20KB"),
        ("sd3", "fp16", "20KB"),
    ],
)
def test_weights_of_a_variant_alone_are_read_in_float32(
    folder: Path, tmp_path: Path, family: str, variant: str, size: str | None
) -> None:
    """Exactly the numbers of the files, in float32, as plain diffusers reads them with the variant
    named."""
    import diffusers

    base, recipe, part = folder, StableDiffusion, "unet"
    if family == "sd3":
        base, recipe, part = save_flow_pipeline(tmp_path / "flow"), StableDiffusion3, "transformer"
    index = json.loads((base / "model_index.json").read_text())
    lacks = {name: None for name, kind in index.items() if kind == [None, None]}
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    half = diffusers.DiffusionPipeline.from_pretrained(base, dtype=dtype, **lacks)
    half.save_pretrained(
        tmp_path / "half", variant=variant, **({"max_shard_size": size} if size else {})
    )
    names = [file.name for file in (tmp_path / "half").rglob("*.safetensors")]
    assert all(variant in name for name in names)
    assert (len(names) > 5) == bool(size)
    policy = recipe(path=str(tmp_path / "half")).load("cpu")
    for name, weight in getattr(half, part).state_dict().items():
        assert torch.equal(policy.network.state_dict()[name], weight.float())
    for name, weight in half.vae.state_dict().items():
        assert torch.equal(policy.family.vae.state_dict()[name], weight.float())
    assert (
        policy.network.dtype
        == policy.family.vae.dtype
        == policy.family.pipeline.text_encoder.dtype
        == torch.float32
    )


def test_parts_may_differ_in_their_variants(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    for part, variant in (("unet", "fp16"), ("vae", "bf16")):
        file = copy / part / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    policy, plain = (StableDiffusion(path=str(one)).load("cpu") for one in (copy, folder))
    for name, weight in plain.network.state_dict().items():
        assert torch.equal(policy.network.state_dict()[name], weight)


@pytest.mark.parametrize("family", ["stable_diffusion", "sd3"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_frozen_denoiser_is_read_in_bfloat16_with_the_same_numbers(
    folder: Path, tmp_path: Path, family: str, saved: bool
) -> None:
    """As read in float32 and rounded: weights, adapters (new ones and a file's), and buffers, which
    stay float32."""
    if family == "sd3":
        folder = save_flow_pipeline(tmp_path / "flow")
    recipe: Any = {"stable_diffusion": StableDiffusion, "sd3": StableDiffusion3}[family]
    lora: dict[str, Any] = {"lora_rank": 2}
    if saved:
        teacher = recipe(path=str(folder), **lora).load("cpu")
        for parameter in teacher.trainable().values():
            parameter.data += 0.01 * torch.randn_like(parameter)
        teacher.save(tmp_path / "adapter")
        lora = {"adapter": str(tmp_path / "adapter")}
    exact = recipe(path=str(folder), **lora).load("cpu").network
    read = recipe(path=str(folder), precision="bfloat16", **lora)
    assert read.denoiser_dtype == torch.bfloat16
    found = read.load("cpu").network
    wanted = dict(exact.named_parameters())
    for name, parameter in found.named_parameters():
        adapter = "lora_" in name
        assert parameter.dtype == (torch.float32 if adapter else torch.bfloat16)
        assert torch.equal(parameter, wanted[name].to(parameter.dtype))
    buffers = dict(exact.named_buffers())
    assert dict(found.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(b, buffers[n]) for n, b in found.named_buffers())
    assert bool(buffers) == (family == "sd3")
    whole = recipe(path=str(folder), precision="bfloat16")
    assert whole.denoiser_dtype == torch.float32


def test_a_folder_without_one_of_its_parts_says_which(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(
        UserError, match=r"copy': it has no folder text_encoder, which its model_in"
    ):
        StableDiffusion(path=str(copy)).load("cpu")


def test_a_damaged_checkpoint_in_one_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot read .*model.safetensors"):
        StableDiffusion3(path=str(file)).load("cpu")


def test_weights_that_the_files_lack_are_not_invented(folder: Path, tmp_path: Path) -> None:
    """The libraries would fill them with random numbers, other ones each time."""
    copy = copy_of(folder, tmp_path / "copy")
    edit(copy / "text_encoder" / "config.json", num_hidden_layers=3)
    with pytest.raises(
        UserError,
        match=r"policy\.path.*copy.*text_encoder: its weights lack .*layers\.2.* and 15 more",
    ):
        StableDiffusion(path=str(copy)).load("cpu")
    edit(copy / "text_encoder" / "config.json", num_hidden_layers=2, intermediate_size=48)
    with pytest.raises(UserError, match=r"text_encoder: its weights lack .*mlp"):
        StableDiffusion(path=str(copy)).load("cpu")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("StableDiffusionXLPipeline", "stable_diffusion"),
        ("StableDiffusionInpaintPipeline", "stable_diffusion"),
        ("StableDiffusion3Pipeline", "stable_diffusion"),
        ("StableDiffusionPipeline", "sd3"),
        (None, "stable_diffusion"),
        (["mine.py", "Mine"], "sd3"),
    ],
)
def test_a_folder_of_another_pipeline_is_refused_by_its_class(
    folder: Path, tmp_path: Path, name: object, family: str
) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    edit(copy / "model_index.json", _class_name=name)
    recipe = {"stable_diffusion": StableDiffusion, "sd3": StableDiffusion3}[family]
    with pytest.raises(
        UserError, match=r"policy\.path.*copy.*_class_name in model_index\.json must be Stable.*got"
    ):
        recipe(path=str(copy)).load("cpu")


@pytest.mark.parametrize("name", ["StableDiffusionInpaintPipeline", "FluxFillPipeline", None, 3])
def test_a_folder_is_read_by_the_policy_that_names_its_class(
    folder: Path, tmp_path: Path, name: object
) -> None:
    """And the class of one that none reads is refused with the classes that are read."""
    assert find_model(str(folder)).recipe.name == "stable_diffusion"
    copy = copy_of(folder, tmp_path / "copy")
    edit(copy / "model_index.json", _class_name="StableDiffusion3Pipeline")
    assert find_model(str(copy)).recipe.name == "sd3"
    edit(copy / "model_index.json", _class_name=name)
    known = r"StableDiffusion3Pipeline \(sd3\), StableDiffusionPipeline \(stable_diffusion\)"
    with pytest.raises(
        UserError, match=rf"_class_name in {copy}/model_index\.json .* {known}.*; got {name!r}"
    ):
        find_model(str(copy))


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        (
            "modle",
            (
                "there is no folder {cwd}/modle, and as a hub id it is not in the cache, and the"
                " hub could not be reached"
            ),
        ),
        (
            "mine/modle",
            "there is no folder {cwd}/mine/modle, and as a hub id it is not in the cache",
        ),
        (
            "runs/x/policy",
            "there is no folder {cwd}/runs/x/policy, and as a hub id it is malformed",
        ),
        ("./runs/x", "there is no folder {cwd}/runs/x$"),
        ("/no/where", "there is no folder /no/where$"),
        ("empty", "{cwd}/empty has no model_index.json$"),
        ("run", "{cwd}/run has no model_index.json; its policy is in run/policy$"),
    ],
)
def test_a_mistyped_path_is_answered_with_the_place_that_was_looked_at(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, rest: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    copy_of(folder, tmp_path / "run" / "policy")
    rule = rf"policy\.path must be a diffusers pipeline folder or a hub id, got '{path}': "
    with pytest.raises(
        UserError, match=rule + rest.format(cwd=tmp_path).replace(".json", r"\.json")
    ):
        StableDiffusion(path=path).load("cpu")


def test_a_model_that_is_nowhere_is_answered_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"got 'modle', and looked at {tmp_path}/modle"):
        find_model("modle")


def test_a_hub_id_is_read_from_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, from a cache as the hub's client lays it out; also where it holds a variant
    alone."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--mine--small" / "snapshots" / ("0" * 40)
    copy_of(folder, snapshot)
    (tmp_path / "models--mine--small" / "refs").mkdir()
    (tmp_path / "models--mine--small" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path))
    policy = StableDiffusion(path="mine/small").load("cpu")
    plain = StableDiffusion(path=str(folder)).load("cpu")
    for name, weight in plain.network.state_dict().items():
        assert torch.equal(policy.network.state_dict()[name], weight)
