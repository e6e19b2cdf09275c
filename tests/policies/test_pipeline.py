"""What families of pipelines share: parts that are missing, sizes, threads; and a test's own family
of masks and an autoencoder that keeps state, against diffusers' own pipeline."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks.pipelines.packing import pack, unpack
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.base import Policy
from rlalign.policies.flux import Flux
from rlalign.policies.sdxl import StableDiffusionXL
from tests.policies import kinds

PROMPTS = ("a red circle", "two")
ON_THE_SHELF: dict[str, Any] = {"sdxl": StableDiffusionXL, "flux": Flux}
masked_alone = pytest.mark.parametrize("kind", ["masked"], indirect=True)
"""The others go through ``acceptance.py``."""


@pytest.fixture(scope="module", params=[*ON_THE_SHELF, "masked"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, recipe of a saved pipeline)."""
    folder = tmp_path_factory.mktemp("kind") / "pipeline"
    name = request.param
    if name == "masked":
        return name, kinds.MaskedRecipe(path=str(kinds.save_small(kinds.masked, folder)))
    write_pipeline(folder, FAMILIES[name], seed=1)
    return name, ON_THE_SHELF[name](path=str(folder))


@masked_alone
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("plan", kinds.PLANS.values(), ids=kinds.PLANS)
def test_it_draws_what_the_pipeline_draws(kind: Any, plan: Plan, guidance: float) -> None:
    """Deterministic sampling from the same noise, three steps: latents to 1e-5 of the largest, and
    pictures to 2e-5."""
    _, recipe = kind
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
    told = {"num_inference_steps": 3, "height": height, "width": width, "latents": pack(noise)}
    told |= {"true_cfg_scale": guidance, "negative_prompt": [" "] * 2}
    latents = pipeline(list(PROMPTS), **told, output_type="latent").images
    wanted = unpack(latents, noise.shape)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1.0)
    pictures = pipeline(list(PROMPTS), **told, output_type="pt").images
    with torch.no_grad():
        media = policy.decode(found)
    assert media.shape == (2, 1, 3, height, width)
    assert (media[:, 0] - pictures).abs().max() <= 2e-5


@masked_alone
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


@masked_alone
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


@masked_alone
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
    part = "text_encoder" if kind[0] == "masked" else "text_encoder_2"
    assert f"it has no {part}, which {name} needs" in refused({part: [None, None]})


def test_a_size_is_whole_tokens(kind: Any) -> None:
    _, recipe = kind
    with pytest.raises(UserError, match=r"plan\.height and plan\.width must be multiples of \d"):
        recipe.load("cpu").latent_shape(Plan(height=17, width=16))


@pytest.mark.parametrize("name", ON_THE_SHELF)
def test_a_family_of_pipelines_is_one_short_file(name: str) -> None:
    module = sys.modules[ON_THE_SHELF[name].__module__]
    assert len(inspect.getsource(module).splitlines()) <= 120
