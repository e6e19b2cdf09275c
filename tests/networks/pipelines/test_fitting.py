"""Networks that are told more than a prompt, parts that do not fit, sizes, and autoencoders without
a posterior."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.policies.sd3 import StableDiffusion3
from rlalign.policies.stable_diffusion import StableDiffusion
from tests.networks.pipelines.helpers import copy_of, edit
from tests.pipelines import LARGE, spoil
from tests.toy import save_flow_pipeline

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def with_unet(folder: Path, place: Path, **settings: Any) -> Path:
    copy = copy_of(folder, place)
    shutil.rmtree(copy / "unet")
    diffusers.UNet2DConditionModel(**{**UNET, **settings}).save_pretrained(copy / "unet")
    return copy


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"in_channels": 9},
            "in_channels must be 4, the latent channels of its vae, got 9: an inpainting model",
        ),
        ({"in_channels": 8}, "in_channels must be 4, the latent channels of its vae, got 8"),
        ({"out_channels": 8}, "out_channels must be 4, the latent channels of its vae, got 8"),
        ({"num_class_embeds": 10}, "num_class_embeds must be null, got 10: .* a class label"),
        (
            {"class_embed_type": "timestep"},
            "class_embed_type must be null, got 'timestep': .* a class label",
        ),
        (
            {"time_cond_proj_dim": 16},
            "time_cond_proj_dim must be null, got 16: .* the guidance scale, as a consistency",
        ),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 40,
            },
            "addition_embed_type must be null or text, got 'text_time': .* Stable Diffusion XL",
        ),
        (
            {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16},
            "encoder_hid_dim_type .* a picture",
        ),
        ({"cross_attention_dim": 24}, r"cannot be asked \("),
    ],
    ids=str,
)
def test_a_unet_that_is_told_more_than_a_prompt_is_refused_by_name(
    folder: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    copy = with_unet(folder, tmp_path / "copy", **settings)
    with pytest.raises(UserError, match=rf"policy\.path: cannot read '.*copy': unet: {said}"):
        StableDiffusion(path=str(copy)).load("cpu")


MISFITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no text encoder": (
        lambda f: edit(f / "model_index.json", text_encoder=[None, None]),
        "has no text_encoder, which StableDiffusionPipeline needs",
    ),
    "a prompt longer than is read": (
        lambda f: edit(f / "tokenizer" / "tokenizer_config.json", model_max_length=17),
        "model_max_length must be a number from 2 to 16, .* got 17",
    ),
    "a prompt without a word": (
        lambda f: edit(f / "tokenizer" / "tokenizer_config.json", model_max_length=1),
        "model_max_length must be a number from 2 to 16, .* got 1",
    ),
    "no scale": (
        lambda f: edit(f / "vae" / "config.json", scaling_factor=None),
        r"vae: cannot be asked \(",
    ),
    "a unet of weights that are too large": (
        lambda f: spoil(f, "unet", "conv_out.weight", LARGE),
        "unet: gives numbers that are not finite",
    ),
    "a size in words": (
        lambda f: edit(f / "unet" / "config.json", sample_size="large"),
        r"sample_size must be a number > 0 or \[height, width\], got 'large'",
    ),
}


@pytest.mark.parametrize(("change", "said"), MISFITS.values(), ids=MISFITS)
def test_parts_that_do_not_fit_are_refused_by_name(
    folder: Path, tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    change(copy)
    with pytest.raises(UserError, match=rf"policy\.path.*copy.*{said}"):
        StableDiffusion(path=str(copy)).load("cpu").latent_shape(Plan())


@pytest.mark.parametrize(
    ("size", "plan", "shape"),
    [
        ([8, 8], Plan(), (4, 8, 8)),
        ([8, 12], Plan(), (4, 8, 12)),
        ([12, 8], Plan(width=32), (4, 12, 16)),
        (12, Plan(height=20), (4, 10, 12)),
        (None, Plan(height=20, width=24), (4, 10, 12)),
    ],
    ids=str,
)
def test_a_size_is_a_number_or_height_and_width(
    folder: Path, tmp_path: Path, size: Any, plan: Plan, shape: tuple[int, ...]
) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    edit(copy / "unet" / "config.json", sample_size=size)
    assert StableDiffusion(path=str(copy)).load("cpu").latent_shape(plan) == shape


@pytest.mark.parametrize("plan", [Plan(), Plan(height=16), Plan(width=16)], ids=str)
def test_without_a_size_the_plan_must_say_it(folder: Path, tmp_path: Path, plan: Plan) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    edit(copy / "unet" / "config.json", sample_size=None)
    said = (
        rf"plan\.height and plan\.width must be given for '.*copy', .* got {plan.height} x"
        rf" {plan.width}"
    )
    with pytest.raises(UserError, match=said):
        StableDiffusion(path=str(copy)).load("cpu").latent_shape(plan)


def test_a_transformer_is_asked_for_no_more_than_its_positions(tmp_path: Path) -> None:
    folder = save_flow_pipeline(tmp_path / "pipeline")
    policy = StableDiffusion3(path=str(folder)).load("cpu")
    assert policy.latent_shape(Plan(height=24, width=24)) == (4, 12, 12)
    with pytest.raises(
        UserError, match=r"plan\.height and plan\.width must be at most 24, .* got 28 x 16"
    ):
        policy.latent_shape(Plan(height=28))


def test_an_autoencoder_without_a_posterior_reads_pictures(folder: Path, tmp_path: Path) -> None:
    """The small autoencoder that many use for previews: its latents, times the scale, as diffusers'
    image-to-image reads."""
    copy = copy_of(folder, tmp_path / "copy")
    shutil.rmtree(copy / "vae")
    small = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.5,
    )
    small.save_pretrained(copy / "vae")
    edit(copy / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    policy = StableDiffusion(path=str(copy)).load("cpu")
    media = torch.rand(2, 1, 3, 16, 16)
    with torch.no_grad():
        wanted = small.eval().encode(media[:, 0] * 2 - 1).latents * 0.5
        assert torch.equal(policy.encode_media(media), wanted)
        assert policy.decode(wanted).shape == (2, 1, 3, 16, 16)


def test_an_autoencoder_of_another_kind_is_refused(folder: Path, tmp_path: Path) -> None:
    """One whose decoder draws noise of its own would give other pictures each time."""
    copy = copy_of(folder, tmp_path / "copy")
    shutil.rmtree(copy / "vae")
    diffusers.VQModel(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4
    ).save_pretrained(copy / "vae")
    edit(copy / "model_index.json", vae=["diffusers", "VQModel"])
    with pytest.raises(
        UserError, match="vae: must be AutoencoderKL or AutoencoderTiny or Asym.*, got VQModel"
    ):
        StableDiffusion(path=str(copy)).load("cpu")
