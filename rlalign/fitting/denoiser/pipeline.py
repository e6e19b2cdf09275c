"""The pipeline's components with fresh weights, and the folder that plain diffusers loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlalign.core.files import replacing
from rlalign.core.registry import UserError
from rlalign.fitting.denoiser.corpus import CAPTION_MARKS, CAPTION_WORDS, SIZE
from rlalign.fitting.denoiser.settings import Pretrain, Task
from rlalign.networks.pipelines.loading import load_network, quiet_libraries

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
LATENT_CHANNELS = 4
_TOKENS = 16  # the longest caption has 8 words and two marks


@dataclass(frozen=True, kw_only=True)
class Components:
    """The live parts of a Stable Diffusion pipeline, under its names. Their types are diffusers'
    and transformers'."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any


def components(config: Pretrain) -> Components:
    """The parts with fresh weights, which depend on the seed alone."""
    tokenizer = caption_tokenizer(config.task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vae = _vae(config)
        text = _text_encoder(config, tokenizer)
        unet = _unet(config)
    return Components(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=_scheduler()
    )


def _vae(config: Pretrain) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(  # its annotations say tuples of one
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
        block_out_channels=config.autoencoder.channels,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
        # right as it stands: standardise() folds one factor per channel into the 1x1 convolutions
        scaling_factor=1.0,
    )


def _text_encoder(config: Pretrain, tokenizer: Any) -> Any:
    from transformers import CLIPTextModel

    return CLIPTextModel(text_config(config, tokenizer))


def text_config(config: Pretrain, tokenizer: Any) -> Any:
    """The settings of a text encoder as wide and deep as the run says."""
    from transformers import CLIPTextConfig

    width = config.denoiser.text_width
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=4 * width,
        num_hidden_layers=config.denoiser.text_layers,
        num_attention_heads=4,
        max_position_embeddings=_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def read_autoencoder(source: str, *, shipped: str, kind: str) -> Any:
    """The autoencoder, of diffusers' class ``kind``, of a pipeline folder, or of the package's
    model ``shipped`` where the source is "tiny". Raises UserError where there is none."""
    assets = Path(__file__).parents[2] / "assets"
    folder = assets / shipped if source == "tiny" else Path(source)
    if not (folder / "vae" / "config.json").is_file():
        raise UserError(
            "autoencoder.source must be tiny or a pipeline folder with vae/config.json, got"
            f" {source!r}"
        )
    rule = f"autoencoder.source: cannot load {source!r}"
    with quiet_libraries():
        return load_network(folder / "vae", ["diffusers", kind], rule)


def load_vae(source: str) -> Any:
    """The autoencoder of a pipeline folder, or of the shipped tiny model. Raises UserError where
    there is none."""
    vae = read_autoencoder(source, shipped="tiny", kind="AutoencoderKL")

    # other sizes would not fit the denoiser
    shape = (vae.config.latent_channels, len(vae.config.block_out_channels))
    if shape != (LATENT_CHANNELS, 2):
        raise UserError(
            f"autoencoder.source must have {LATENT_CHANNELS} latent channels and 2 levels, got"
            f" {shape[0]} and {shape[1]} in {source!r}; name another"
        )
    return vae.eval().requires_grad_(False)


def _unet(config: Pretrain) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=config.denoiser.channels,
        # no attention at 16x16: it would triple the cost of a pass
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=config.denoiser.text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def _scheduler() -> Any:
    """Stable Diffusion's schedule and grid."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def caption_tokenizer(task: Task = "shapes") -> Any:
    """A CLIP tokenizer to which every word of a task's captions is one token; other words fall into
    letters."""
    from transformers import CLIPTokenizer

    # all letters and marks, within a word and at its end
    signs = _ALPHABET + CAPTION_MARKS[task]
    vocabulary = [
        "<|startoftext|>",
        "<|endoftext|>",
        *signs,
        *(sign + "</w>" for sign in signs),
    ]

    # merges make each word of a caption one token
    merges: list[tuple[str, str]] = []
    for word in CAPTION_WORDS[task]:
        parts = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:  # what the merges so far make of the word
            parts = _merged(parts, merge)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = _merged(parts, merges[-1])
            vocabulary.append(parts[0])
    ids = {token: n for n, token in enumerate(dict.fromkeys(vocabulary))}
    pairs: Any = merges
    return CLIPTokenizer(vocab=ids, merges=pairs, model_max_length=_TOKENS)


def _merged(parts: list[str], merge: tuple[str, str]) -> list[str]:
    """Word pieces after one byte-pair merge, from left to right."""
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == merge:
            result[-1] += part
        else:
            result.append(part)
    return result


def tokenise(tokenizer: Any, captions: Sequence[str]) -> torch.Tensor:
    """(N, L) int64, padded to the tokenizer's length as a diffusers pipeline pads."""
    return tokenizer(
        [*captions], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids


def write_pipeline(parts: Components, task: Task, folder: Path) -> Path:
    """A Stable Diffusion pipeline folder, float32 safetensors; replaces an earlier one in one
    rename."""
    from diffusers import StableDiffusionPipeline

    # diffusers takes None here, its annotations do not
    absent: Any = None
    # a used tokenizer remembers the padding of its last call and would save it
    fresh = vars(parts) | {"tokenizer": caption_tokenizer(task)}
    pipeline = StableDiffusionPipeline(
        **fresh, safety_checker=absent, feature_extractor=absent, requires_safety_checker=False
    )
    return save_pipeline(pipeline, folder)


def save_pipeline(pipeline: Any, folder: Path) -> Path:
    """Saves a diffusers pipeline, replacing an earlier one in one rename."""
    with replacing(folder) as scratch:
        pipeline.save_pretrained(scratch, safe_serialization=True)
        # safetensors writes for the owner alone; a checkout or a package is read by others
        for file in scratch.rglob("*.safetensors"):
            file.chmod(0o644)
    return folder
