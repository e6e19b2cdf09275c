"""What families of pipelines share, against diffusers' own pipelines of three kinds: two encoders
with sizes, packed latents with a told guidance, masks with an autoencoder that keeps state."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks.pipelines.packing import pack, unpack
from rlalign.policies.base import Policy
from tests.policies import kinds

PROMPTS = ("a red circle", "two")
KINDS: dict[str, tuple[Any, Any]] = {
    "two encoders": (kinds.TwoEncodersRecipe, kinds.two_encoders),
    "packed": (kinds.PackedRecipe, kinds.packed),
    "masked": (kinds.MaskedRecipe, kinds.masked),
}
GUIDED = {
    "two encoders": lambda w: {"guidance_scale": w},
    "packed": lambda w: {
        "true_cfg_scale": w,
        "negative_prompt": [""] * 2,
        "max_sequence_length": 12,
    },
    "masked": lambda w: {"true_cfg_scale": w, "negative_prompt": [" "] * 2},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, recipe of a saved pipeline)."""
    recipe, make = KINDS[request.param]
    folder = kinds.save_small(make, tmp_path_factory.mktemp("kind") / "pipeline")
    return request.param, recipe(path=str(folder))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("plan", kinds.PLANS.values(), ids=kinds.PLANS)
def test_it_draws_what_the_pipeline_draws(kind: Any, plan: Plan, guidance: float) -> None:
    """Deterministic sampling from the same noise, three steps: latents to 1e-5 of the largest, and
    pictures to 2e-5."""
    name, recipe = kind
    policy = recipe.load("cpu")
    family = policy.family
    size = {"height": plan.height, "width": plan.width}
    torch.manual_seed(1)
    noise = torch.randn(2, *family.latent_shape(plan))
    found = policy.sample(
        PROMPTS, steps=3, guidance=guidance, latents=noise, output="latents", **size
    )
    height, width = family.drawn_size(plan)
    pipeline = family.pipeline
    pipeline.set_progress_bar_config(disable=True)
    packs = name != "two encoders"
    told = {"num_inference_steps": 3, "height": height, "width": width, **GUIDED[name](guidance)}
    told |= {"latents": pack(noise) if packs else noise.clone()}
    latents = pipeline(list(PROMPTS), **told, output_type="latent").images
    wanted = unpack(latents, noise.shape) if packs else latents
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1.0)
    pictures = pipeline(list(PROMPTS), **told, output_type="pt").images
    with torch.no_grad():
        media = policy.decode(found)
    assert media.shape == (2, 1, 3, height, width)
    assert (media[:, 0] - pictures).abs().max() <= 2e-5


def test_pictures_come_back_to_latents_of_the_same_scale(kind: Any) -> None:
    """Encoded, and back in the autoencoder's own scale: what its encoder gives."""
    _, recipe = kind
    policy = recipe.load("cpu")
    family = policy.family
    media = torch.rand(2, 1, 3, 16, 16)
    with torch.no_grad():
        latents = policy.encode_media(media)
        pixels = media[:, 0] * 2 - 1
        still = bool(family.own_per_thread)
        encoded = family.vae.encode(pixels[:, :, None] if still else pixels).latent_dist.mode()
    wanted = encoded[:, :, 0] if still else encoded
    assert latents.shape == (2, *family.latent_shape(Plan(height=16, width=16)))
    torch.testing.assert_close(family.to_autoencoder(latents), wanted, atol=1e-5, rtol=1e-5)


def test_an_autoencoder_that_keeps_state_is_one_a_thread(kind: Any) -> None:
    name, recipe = kind
    policy = recipe.load("cpu")
    twin = policy.replica()
    assert (twin.family.vae is policy.family.vae) == (name != "masked")
    assert twin.family.memory is policy.family.memory
    assert twin.meter is not policy.meter


def trained(recipe: Any) -> Policy:
    policy = recipe.model_copy(update={"lora_rank": 2, "lora_alpha": 4.0}).load("cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return policy


def test_its_adapter_is_one_of_plain_diffusers(kind: Any, tmp_path: Path) -> None:
    """Another alpha than the rank: the file in a plain pipeline, and a run that starts from it, say
    what the policy says."""
    import diffusers

    _, recipe = kind
    policy = trained(recipe)
    policy.save(tmp_path)
    assert len(load_file(tmp_path / "pytorch_lora_weights.safetensors")) > 0
    again = recipe.model_copy(update={"adapter": str(tmp_path)}).load("cpu")
    plain = recipe.load("cpu")
    plain.family.pipeline = diffusers.DiffusionPipeline.from_pretrained(recipe.path)
    plain.family.pipeline.load_lora_weights(tmp_path)
    plain.family.network = getattr(plain.family.pipeline, plain.family.part).eval()
    shape = policy.latent_shape(Plan(height=16, width=16))
    x = torch.randn(2, *shape)
    timestep_B = torch.tensor([700, 200])
    words = policy.encode(PROMPTS).caption
    with torch.no_grad():
        said = policy.answer(x, timestep_B, words)
        for other in (again, plain, policy.merged()):
            theirs = other.answer(x, timestep_B, words)
            torch.testing.assert_close(theirs, said, atol=2e-6, rtol=1e-5)
        with policy.as_reference():
            assert not torch.allclose(policy.answer(x, timestep_B, words), said, atol=1e-4)


def test_gradient_checkpointing_repeats_the_gradient(kind: Any) -> None:
    _, recipe = kind
    found = []
    for checkpointing in (False, True):
        change = {"gradient_checkpointing": checkpointing, "lora_rank": 2}
        policy = recipe.model_copy(update=change).load("cpu")
        torch.manual_seed(0)
        x = torch.randn(2, *policy.latent_shape(Plan(height=16, width=16)))
        words = policy.encode(PROMPTS).caption
        policy.answer(x, torch.tensor([700, 200]), words).square().mean().backward()
        grads = [p.grad for p in policy.trainable().values() if p.grad is not None]
        found.append(torch.cat([g.flatten() for g in grads]))
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


def test_a_missing_part_is_named(kind: Any, tmp_path: Path) -> None:
    """One whose folder is gone, one that the index leaves out, and a pipeline of another class."""
    _, recipe = kind
    family = recipe.family

    def refused(change: dict[str, Any], *, without: str = "") -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(recipe.path, copy)
        index = json.loads((copy / "model_index.json").read_text()) | change
        (copy / "model_index.json").write_text(json.dumps(index))
        shutil.rmtree(copy / without if without else copy / "none", ignore_errors=True)
        with pytest.raises(UserError) as caught:
            recipe.model_copy(update={"path": str(copy)}).load("cpu")
        return str(caught.value)

    assert "it has no folder vae, which its model_index.json names" in refused({}, without="vae")
    (name,) = family.pipeline_classes
    assert f"must be {name}, got 'NoPipeline'" in refused({"_class_name": "NoPipeline"})
    part = list(family.needs)[-1]
    assert f"it has no {part}, which {name} needs" in refused({part: [None, None]})


def test_a_size_is_whole_tokens(kind: Any) -> None:
    _, recipe = kind
    with pytest.raises(UserError, match=r"plan\.height and plan\.width must be multiples of \d"):
        recipe.load("cpu").latent_shape(Plan(height=17, width=16))


def test_a_kind_of_pipeline_is_told_in_few_lines() -> None:
    for recipe, _ in KINDS.values():
        lines = len(inspect.getsource(recipe).splitlines())
        lines += len(inspect.getsource(recipe.family).splitlines())
        assert lines <= 70
