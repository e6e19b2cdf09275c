"""LoRAs in ComfyUI's keys, on small pipelines of random weights: which keys, and what plain
diffusers' loader makes of the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from rlalign.core.records import Plan
from rlalign.core.registry import UserError, build, load_class, names
from rlalign.networks import comfyui, lora
from rlalign.networks.random_models import find_family, write_pipeline
from rlalign.policies.base import PipelineFamily, Policy

RANK, ALPHA = 4, 8.0
FIRST = {
    "stable_diffusion": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.alpha"
    ),
    "sdxl": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k.alpha",
    "sd3": "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight",
    "flux": "lora_transformer_single_transformer_blocks_0_attn_to_k.alpha",
    "flux2": "transformer.single_transformer_blocks.0.attn.to_out.lora_A.weight",
    "ltx": "diffusion_model.transformer_blocks.0.attn1.to_k.lora_A.weight",
    "qwen_image": "lora_unet_transformer_blocks_0_attn_add_k_proj.alpha",
    "z_image": "diffusion_model.context_refiner.0.attention.to_k.lora_A.weight",
}
"""Family -> the first of its keys in the order of the alphabet."""
KEYLESS = {"cogvideox", "hunyuan_video", "pixart", "sana", "wan", "wan_i2v"}
"""Families of which ComfyUI and diffusers share no keys."""
SETTINGS: dict[str, dict[str, Any]] = {
    "flux": {"embedded_guidance": 3.5},
    "flux2": {"text_tokens": 144},
    "qwen_image": {"text_tokens": 144},
    "z_image": {"text_tokens": 144},
}
"""Of a policy; fewer tokens are less work."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small pipeline of each family."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name in FIRST:
        write_pipeline(folder / name, find_family(name))
    return {name: folder / name for name in FIRST}


def trained(name: str, folder: Path, **settings: Any) -> Policy:
    """With adapters as large as training might make them."""
    told = SETTINGS.get(name, {})
    settings = {"lora_rank": RANK, "lora_alpha": ALPHA, **told, **settings}
    recipe: Any = build("policies", {"name": name, "path": str(folder), **settings})
    policy = recipe.load("cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def added(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the adapters add to the weight of each layer."""
    found = lora.layers(network).items()
    return {name: layer.scale * (layer.up @ layer.down) for name, layer in found}


@torch.no_grad()
def prediction(policy: Policy, network: Any) -> torch.Tensor:
    family: Any = policy.family
    shape = (1, *family.latent_shape(Plan(height=8 * family.factor, width=8 * family.factor)))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    words = policy.encode(["a red circle"]).caption
    return family.with_network(network).predict(latents, torch.tensor([501.0]), words)


@pytest.mark.promise
@pytest.mark.parametrize("name", FIRST)
def test_plain_diffusers_computes_the_same_with_the_file(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Difference 0, of every layer's weight and of the prediction, with an alpha that is not the
    rank."""
    policy = trained(name, folders[name])
    policy.save_comfyui(tmp_path / "lora.safetensors")
    assert min(load_file(tmp_path / "lora.safetensors")) == FIRST[name]
    pipeline = DiffusionPipeline.from_pretrained(folders[name], local_files_only=True)
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name=lora.ADAPTER)
    network = getattr(pipeline, policy.family.part)  # type: ignore[attr-defined]
    mine, theirs = added(policy.network), added(network)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[layer], theirs[layer]) for layer in mine)
    said = prediction(policy, policy.network)
    assert torch.equal(prediction(policy, network.eval()), said)
    with policy.as_reference():
        assert not torch.allclose(prediction(policy, policy.network), said, atol=1e-3)


@pytest.mark.parametrize("name", ["stable_diffusion", "sdxl"])
def test_the_keys_of_a_unet_are_those_that_diffusers_writes(
    folders: dict[str, Path], name: str
) -> None:
    """Its own converter takes alpha to be the rank; there it differs."""
    policy = trained(name, folders[name])
    mine = comfyui.name_tensors(lora.layers(policy.network), "lora_unet_")
    tensors = get_peft_model_state_dict(policy.network)
    theirs = convert_state_dict_to_kohya({f"unet.{n}": t for n, t in tensors.items()})
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        expected = torch.tensor(ALPHA) if key.endswith(".alpha") else theirs[key]
        assert torch.equal(tensor, expected)


def test_every_family_has_keys_or_a_reason() -> None:
    """Where a LoRA can be trained in a pipeline of diffusers."""
    for name in names("policies"):
        recipe: Any = load_class("policies", name)
        family = recipe.family
        if recipe.by_folder and issubclass(family, PipelineFamily):
            assert (name in FIRST) == (family.comfyui_keys is not None), name
            assert (name in FIRST) != (name in KEYLESS), name


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2", "ltx", "qwen_image", "z_image"])
def test_a_scale_that_is_no_power_of_two_is_near(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """To the rounding of one product."""
    policy = trained(name, folders[name], lora_alpha=10.0)
    policy.save_comfyui(tmp_path / "lora.safetensors")
    found = comfyui.read_back(
        policy.family.pipeline,  # type: ignore[attr-defined]
        "transformer",
        tmp_path / "lora.safetensors",
    )
    for layer, mine in lora.layers(policy.network).items():
        theirs = found[layer].scale * (found[layer].up @ found[layer].down)
        expected = mine.scale * (mine.up @ mine.down)
        torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-6)


def test_reading_back_leaves_the_policy_alone_and_takes_no_weights(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    policy = trained("stable_diffusion", folders["stable_diffusion"])
    pipeline: Any = policy.family.pipeline  # type: ignore[attr-defined]
    before = prediction(policy, policy.network)
    state = torch.random.get_rng_state()
    policy.save_comfyui(tmp_path / "lora.safetensors")
    assert pipeline.unet is policy.network
    assert torch.equal(prediction(policy, policy.network), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    content = (tmp_path / "lora.safetensors").read_bytes()
    policy.save_comfyui(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == content


def test_layers_that_diffusers_reads_otherwise_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """FLUX's feed-forward layers have no place in diffusers' conversion of these keys: here one
    would overwrite another."""
    policy = trained("flux", folders["flux"], lora_rank=0, lora_alpha=0.0)
    lora.attach(policy.network, rank=2, alpha=3.0, targets=("to_q", "ff.net.2", "ff_context.net.2"))
    with pytest.raises(UserError, match=r"--format comfyui must be left out for an adapter of"):
        policy.save_comfyui(tmp_path / "lora.safetensors")


def test_numbers_that_diffusers_reads_otherwise_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A layer with another scale than the others, which diffusers overlooks in a UNet's keys; and
    another matrix."""
    policy = trained("stable_diffusion", folders["stable_diffusion"])
    mine = lora.layers(policy.network)
    first = next(iter(mine))
    policy.network.get_submodule(first).scaling[lora.ADAPTER] = 3.0  # type: ignore[operator, index]
    with (
        pytest.warns(RuntimeWarning, match="alpha_pattern"),
        pytest.raises(UserError, match=rf"the numbers of {first}\)"),
    ):
        policy.save_comfyui(tmp_path / "lora.safetensors")
    changed = {**mine, first: replace(mine[first], up=mine[first].up.flip(0))}
    with pytest.raises(UserError, match=rf"the numbers of {first}\)"):
        comfyui._refuse_difference(mine, changed)


def test_what_has_no_such_file_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = trained("stable_diffusion", folders["stable_diffusion"], lora_rank=0, lora_alpha=0.0)
    with pytest.raises(UserError, match="for a model without a LoRA, whose weights were all"):
        whole.save_comfyui(tmp_path / "lora.safetensors")
    points: Any = build("policies", {"name": "points", "lora_rank": 2})
    with pytest.raises(UserError, match="diffusers and ComfyUI share no keys, as PointsFamily"):
        points.load("cpu").save_comfyui(tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())
