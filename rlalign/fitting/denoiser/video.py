"""The text-to-video model in Wan's format: its autoencoder, its components, its loss, and its
pipeline folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlalign.core.registry import UserError
from rlalign.data.motion import CAPTION_MARKS, CAPTION_WORDS
from rlalign.diffusion.noise import generator, normal
from rlalign.diffusion.paths import RectifiedFlow
from rlalign.fitting.denoiser import stages
from rlalign.fitting.denoiser.flow import levels
from rlalign.fitting.denoiser.pipeline import read_autoencoder, save_pipeline
from rlalign.fitting.denoiser.settings import Pretrain

LATENT_CHANNELS = 16
TOKENS = 16  # the longest caption has 13 words and an end
PIPELINE_ROWS = 512
"""Rows of text that a call of the pipeline tells its transformer when it is not asked for fewer."""

_HEAD = 24
_SHIFT = 3.0  # as Wan's own checkpoints ship it
_FOLD = 4  # pixels of a latent's side: a patch of 2 before the network, and one level of halving
_STRIDE = 2  # frames of a latent
_PATCH = (1, 2, 2)  # latents of a token
_STILLS = 6
"""Single frames in place of a clip, while an autoencoder learns from stills."""
_EXTRA_ROWS = 0.5
"""Share of samples that are told as many rows as a call of the pipeline; the others ``TOKENS``."""
_FIRST_LOG_VARIANCE = -6.0
_OBJECT_WEIGHT = 4.0
_APART = 0.5
"""Of values in [-1, 1]: what differs from its clip's ground by more is an object's."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORD_START = "\u2581"


def clip_autoencoder(config: Pretrain) -> Any:
    """A causal autoencoder of clips with fresh weights, which depend on the seed alone: F frames of
    H x W to 1 + (F - 1) / 2 latents of a quarter of each side."""
    from diffusers import AutoencoderKLWan

    narrow, wide = config.autoencoder.channels
    if wide % narrow:
        raise UserError(
            "autoencoder.channels of clips must be a width and a multiple of it, got"
            f" ({narrow}, {wide})"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vae = AutoencoderKLWan(
            base_dim=narrow,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, wide // narrow],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_temporal=_STRIDE,
            scale_factor_spatial=_FOLD,
        )
    _ease(vae)
    return vae


@torch.no_grad()
def _ease(vae: Any) -> None:
    """First weights from which an autoencoder learns quickly: residual branches that add nothing
    yet, so that it is almost linear (Zhang 2019, arXiv:1901.09321), and a posterior narrow enough
    not to hide what the latents tell."""
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    for module in vae.modules():
        last = None
        if isinstance(module, wan.WanResidualBlock):
            last = module.conv2
        elif isinstance(module, wan.WanAttentionBlock):
            last = module.proj
        for parameter in last.parameters() if last else ():
            parameter.zero_()
    vae.quant_conv.bias[LATENT_CHANNELS:] = _FIRST_LOG_VARIANCE


def clip_autoencoder_loss(
    vae: Any, clips_NCFHW: torch.Tensor, config: Pretrain
) -> Callable[[int], torch.Tensor]:
    """Update -> L1 + L2 of the reconstruction + KL of the posterior, as for pictures, in which a
    pixel of an object counts five times: an object covers a twentieth of a clip, and the median
    that L1 looks for is the ground.

    The first ``still_updates`` see six single frames in place of each clip, which vary more than
    the frames of one: the layers learn there what they need in space, with their newest tap in
    time (as Wan's autoencoder, arXiv:2503.20314, section 4.1, begins with pictures).
    """
    settings = config.autoencoder
    frames = clips_NCFHW.shape[2]

    def draw(update: int, rng: np.random.Generator) -> torch.Tensor:
        if update >= settings.still_updates:
            rows_B = torch.from_numpy(rng.integers(len(clips_NCFHW), size=settings.batch))
            return clips_NCFHW[rows_B]
        rows_B, frame_B = (
            torch.from_numpy(rng.integers(most, size=_STILLS * settings.batch))
            for most in (len(clips_NCFHW), frames)
        )
        return clips_NCFHW[rows_B, :, frame_B, None]

    def loss(update: int) -> torch.Tensor:
        # which clips, and how much each of their pixels counts
        key = ("pretrain", config.seed, "autoencoder", update)
        pixels = draw(update, generator(*key, "rows")).float() / 127.5 - 1.0
        ground_BC = pixels.flatten(2).median(dim=2).values
        apart_BFHW = (pixels - ground_BC[:, :, None, None, None]).abs().amax(dim=1)
        weight_B1FHW = 1.0 + _OBJECT_WEIGHT * (apart_BFHW > _APART).float()[:, None]

        # through latents and back
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * normal((*key, "noise"), posterior.mean.shape)
        error = decode_unclamped(vae, latents) - pixels
        kl = posterior.kl().mean() / latents[0].numel()
        return (weight_B1FHW * (error.abs() + error.square())).mean() + settings.kl * kl

    return loss


def decode_unclamped(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """What the autoencoder's ``decode`` gives, before it is clamped to [-1, 1]: outside of it,
    where first weights may lead, a clamped clip has no gradient."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    # frame after frame of the latents, each with what the layers keep of those before
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    parts = []
    for frame in range(hidden.shape[2]):
        vae._conv_idx = [0]
        parts.append(
            vae.decoder(
                hidden[:, :, frame : frame + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=frame == 0,
            )
        )
    vae.clear_cache()
    return unpatchify(torch.cat(parts, dim=2), patch_size=vae.config.patch_size)


def load_clip_autoencoder(source: str) -> Any:
    """The causal autoencoder of a pipeline folder, or of the shipped model. Raises UserError where
    there is none."""
    vae = read_autoencoder(source, shipped="tiny_video", kind="AutoencoderKLWan")
    shape = (vae.config.z_dim, vae.config.scale_factor_spatial, vae.config.scale_factor_temporal)
    if shape != (LATENT_CHANNELS, _FOLD, _STRIDE):
        raise UserError(
            f"autoencoder.source must have {LATENT_CHANNELS} latent channels, {_FOLD} pixels"
            f" and {_STRIDE} frames a latent, got {', '.join(map(str, shape))} in {source!r}; name"
            " another"
        )
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def standardised_clips(vae: Any, clips_NCFHW: torch.Tensor, *, measure: bool) -> torch.Tensor:
    """(N, C, F', H', W') latents of uint8 clips, each channel less its mean and over its standard
    deviation, which the autoencoder's own config holds; ``measure`` takes them from these clips
    first."""
    latents = stages.encode_all(vae, clips_NCFHW)
    if measure:
        vae.register_to_config(
            latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(),
            latents_std=latents.std(dim=(0, 2, 3, 4)).tolist(),
        )
    mean, std = (
        torch.tensor(numbers).reshape(1, -1, 1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


def clip_tokenizer() -> Any:
    """A T5 tokenizer to which every word of a caption is one token; other words fall into
    letters."""
    from transformers import T5Tokenizer

    words = [(_WORD_START + word, -1.0) for word in CAPTION_WORDS]
    letters = [(letter, -10.0) for letter in (_WORD_START, *_LETTERS, *CAPTION_MARKS)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # "a" alone is a word, and a letter
    vocabulary = dict(special + letters + words)
    return T5Tokenizer(vocab=[*vocabulary.items()], extra_ids=0, model_max_length=PIPELINE_ROWS)


def clip_tokens(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """(N, 16) int64 tokens, each caption with its end, padded."""
    return tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


@dataclass(frozen=True, kw_only=True)
class VideoComponents:
    """The live parts that are trained together, under a Wan pipeline's names."""

    transformer: Any
    text_encoder: Any

    def module(self) -> torch.nn.ModuleDict:
        """What is trained."""
        return torch.nn.ModuleDict(vars(self))


def video_components(config: Pretrain) -> VideoComponents:
    """The parts with fresh weights, which depend on the seed alone."""
    from diffusers import WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    settings = config.denoiser
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return VideoComponents(
            transformer=WanTransformer3DModel(
                patch_size=_PATCH,
                num_attention_heads=settings.width // _HEAD,
                attention_head_dim=_HEAD,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                text_dim=settings.text_width,
                freq_dim=settings.width,
                ffn_dim=4 * settings.width,
                num_layers=settings.layers,
                rope_max_seq_len=32,
            ),
            text_encoder=UMT5EncoderModel(
                UMT5Config(
                    vocab_size=len(clip_tokenizer()),
                    d_model=settings.text_width,
                    d_kv=settings.text_width // 4,
                    d_ff=4 * settings.text_width,
                    num_layers=settings.text_layers,
                    num_heads=4,
                    dropout_rate=0.0,
                )
            ),
        )


class CountedRows:
    """An attention processor in which one row of text counts as many.

    A pipeline fills a caption's embeddings with rows of zeros up to the number that it was asked
    for. They carry no position, so they are all alike to every block, and exp(q k) n times is
    exp(q k + log n): one row with log n added to its attention does what n rows do.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.mask_B11L: torch.Tensor | None = None
        """What is added to the attention of each row."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, rows: torch.Tensor, *others: Any
    ) -> torch.Tensor:
        return self.processor(attn, hidden_states, rows, self.mask_B11L, *others[1:])


def count_rows(transformer: Any) -> CountedRows:
    """Puts a ``CountedRows`` into every cross-attention of a Wan transformer."""
    counted = CountedRows(transformer.blocks[0].attn2.processor)
    for block in transformer.blocks:
        block.attn2.set_processor(counted)
    return counted


def read_captions(text_encoder: Any, tokens_BL: torch.Tensor) -> torch.Tensor:
    """(B, L + 1, D) embeddings as the pipeline makes them: zeros behind each caption's end, and one
    more row of zeros."""
    mask_BL = (tokens_BL != text_encoder.config.pad_token_id).long()
    embeds_BLD = text_encoder(tokens_BL, mask_BL).last_hidden_state * mask_BL[..., None]
    return torch.nn.functional.pad(embeds_BLD, (0, 0, 0, 1))


def video_loss(
    parts: torch.nn.ModuleDict,
    latents_NCFHW: torch.Tensor,
    tokens_NL: torch.Tensor,
    empty_1L: torch.Tensor,
    config: Pretrain,
) -> Callable[[int], torch.Tensor]:
    """Update -> flow-matching loss on the update's own batch, noise, levels and dropped captions.

    Half of the samples are told the 512 rows of a pipeline's call, the others 16
    (``max_sequence_length=16``, which is quicker).
    """
    path = RectifiedFlow()
    transformer: Any = parts["transformer"]
    # no part of the weights, and not saved
    counted = count_rows(transformer)

    def loss(update: int) -> torch.Tensor:
        # which latents, at which levels, and whose captions are dropped
        settings = config.denoiser
        key = ("pretrain", config.seed, "denoiser", update)
        rng = generator(*key, "rows")
        rows_B = torch.from_numpy(rng.integers(len(latents_NCFHW), size=settings.batch))
        level_B = levels(settings.levels, settings.batch, rng)
        dropped_B1 = torch.from_numpy(rng.random(settings.batch) < settings.caption_dropout)[
            :, None
        ]
        # what the transformer is told, in how many rows
        tokens_BL = torch.where(dropped_B1, empty_1L, tokens_NL[rows_B])
        embeds_BLD = read_captions(parts["text_encoder"], tokens_BL)
        many_B = torch.from_numpy(rng.random(settings.batch) < _EXTRA_ROWS)
        mask_B11L = embeds_BLD.new_zeros(settings.batch, 1, 1, TOKENS + 1)
        mask_B11L[:, 0, 0, -1] = torch.where(many_B, math.log(PIPELINE_ROWS - TOKENS), -math.inf)
        counted.mask_B11L = mask_B11L
        clean = latents_NCFHW[rows_B]

        def predict(x: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
            return transformer(x, timestep_B.float(), embeds_BLD, return_dict=False)[0]

        return stages.denoising_loss(
            predict, clean, normal((*key, "noise"), clean.shape), level_B, path, "flow"
        )

    return loss


def write_video_pipeline(parts: VideoComponents, vae: Any, folder: Path) -> Path:
    """A Wan pipeline folder of one expert, float32 safetensors."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipeline = WanPipeline(
        **vars(parts),
        vae=vae,
        tokenizer=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=_SHIFT),
    )
    return save_pipeline(pipeline, folder)
