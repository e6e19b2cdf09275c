"""What families of pipelines share: parts that are missing, sizes, scales, threads. What each draws
is held against diffusers in a test of its own."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.networks.random_models import FAMILIES, write_pipeline
from rlalign.policies.cogvideox import CogVideoX
from rlalign.policies.flux import Flux
from rlalign.policies.flux2 import Flux2
from rlalign.policies.hunyuan_video import HunyuanVideo
from rlalign.policies.ltx import LTX
from rlalign.policies.pixart import PixArt
from rlalign.policies.qwen_image import QwenImage
from rlalign.policies.sana import Sana
from rlalign.policies.sdxl import StableDiffusionXL
from rlalign.policies.wan import Wan
from rlalign.policies.z_image import ZImage

ON_THE_SHELF: dict[str, tuple[Any, str]] = {
    "sdxl": (StableDiffusionXL, "text_encoder_2"),
    "flux": (Flux, "text_encoder_2"),
    "cogvideox": (CogVideoX, "text_encoder"),
    "hunyuan_video": (HunyuanVideo, "text_encoder_2"),
    "ltx": (LTX, "text_encoder"),
    "qwen_image": (QwenImage, "text_encoder"),
    "z_image": (ZImage, "text_encoder"),
    "flux2": (Flux2, "tokenizer"),
    "sana": (Sana, "text_encoder"),
    "pixart": (PixArt, "text_encoder"),
    "wan": (Wan, "text_encoder"),
}
"""Family -> its recipe, and a part that it cannot do without."""
SHARED = ("sdxl", "flux", "qwen_image")
"""One of each kind: two encoders with sizes, packed latents with a told guidance, masks with an
autoencoder that keeps state."""


def save_small(name: str, place: Path) -> Any:
    """The recipe of a small pipeline."""
    write_pipeline(place, FAMILIES[name], seed=1)
    return ON_THE_SHELF[name][0](path=str(place))


@pytest.fixture(scope="module", params=SHARED)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, recipe of a saved pipeline)."""
    folder = tmp_path_factory.mktemp("kind") / "pipeline"
    return request.param, save_small(request.param, folder)


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
    assert (twin.family.vae is policy.family.vae) == (name != "qwen_image")
    assert twin.family.memory is policy.family.memory
    assert twin.meter is not policy.meter


@pytest.mark.parametrize("name", ON_THE_SHELF)
def test_a_missing_part_is_named(name: str, tmp_path: Path) -> None:
    """One whose folder is gone, one that the index leaves out, and a pipeline of another class."""
    recipe = save_small(name, tmp_path / "whole")
    part = ON_THE_SHELF[name][1]

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
    classes = recipe.family.pipeline_classes
    assert f"must be {' or '.join(classes)}, got 'NoPipeline'" in refused(
        {"_class_name": "NoPipeline"}
    )
    assert f"it has no {part}, which {classes[0]} needs" in refused({part: [None, None]})


def test_a_size_is_whole_tokens(kind: Any) -> None:
    _, recipe = kind
    with pytest.raises(UserError, match=r"plan\.height and plan\.width must be multiples of \d"):
        recipe.load("cpu").latent_shape(Plan(height=17, width=16))


@pytest.mark.parametrize("name", ON_THE_SHELF)
def test_a_family_of_pipelines_is_one_short_file(name: str) -> None:
    module = sys.modules[ON_THE_SHELF[name][0].__module__]
    assert len(inspect.getsource(module).splitlines()) <= 135


def test_pictures_are_decoded_so_many_at_once(kind: Any) -> None:
    """Bit for bit what groups of rows give one after the other, with a gradient too."""
    _, recipe = kind
    policy = recipe.model_copy(update={"decode_rows": 2}).load("cpu")
    plain = recipe.load("cpu")
    shape = policy.latent_shape(Plan(height=16, width=16))
    latents = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    asked = [latents.clone().requires_grad_(True) for _ in range(2)]
    media = policy.decode(asked[0])
    groups = torch.cat([plain.decode(group) for group in asked[1].split(2)])
    assert torch.equal(media, groups)
    media.mean().backward()
    groups.mean().backward()
    assert torch.equal(asked[0].grad, asked[1].grad)


def test_tiles_are_those_of_plain_diffusers(kind: Any) -> None:
    """What a picture larger than a tile comes to is diffusers' own; smaller ones stay as they
    are."""
    _, recipe = kind
    policy = recipe.model_copy(update={"vae_tiling": True}).load("cpu")
    plain = recipe.load("cpu")
    vae = policy.family.vae
    assert vae.use_tiling and not plain.family.vae.use_tiling
    shape = policy.latent_shape(Plan(height=16, width=16))
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(1, *shape, generator=generator)
    large = torch.randn(1, shape[0], 4 * shape[1], 4 * shape[2], generator=generator)
    for family in (policy.family, plain.family):
        if hasattr(family.vae, "tile_latent_min_size"):
            family.vae.tile_latent_min_size = 2 * shape[-1]
    assert torch.equal(policy.decode(small), plain.decode(small))
    tiled = plain.family.vae
    tiled.enable_tiling()
    assert torch.equal(policy.decode(large), plain.decode(large))
    tiled.disable_tiling()
    if hasattr(vae, "tile_latent_min_size"):
        assert not torch.equal(policy.decode(large), plain.decode(large))
