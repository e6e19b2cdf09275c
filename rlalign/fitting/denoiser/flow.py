"""The flow-matching transformer in Stable Diffusion 3's format: its components, its loss, and its
pipeline folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlalign.diffusion.noise import generator, normal
from rlalign.diffusion.paths import RectifiedFlow
from rlalign.fitting.denoiser.corpus import SIZE
from rlalign.fitting.denoiser.pipeline import (
    LATENT_CHANNELS,
    caption_tokenizer,
    save_pipeline,
    text_config,
)
from rlalign.fitting.denoiser.settings import Pretrain, Task
from rlalign.fitting.denoiser.stages import denoising_loss
from rlalign.fitting.denoiser.zero_rows import MaskedJointAttention, with_zero_row

_PATCH = 2
_HEAD = 16
_ZERO_ROWS = 0.5
"""Share of samples that are told rows of zeros in T5's place."""


@dataclass(frozen=True, kw_only=True)
class FlowComponents:
    """The live parts that are trained together, under a Stable Diffusion 3 pipeline's names."""

    transformer: Any
    text_encoder: Any
    text_encoder_2: Any
    scheduler: Any

    def module(self) -> torch.nn.ModuleDict:
        """What is trained."""
        return torch.nn.ModuleDict({n: p for n, p in vars(self).items() if n != "scheduler"})


def flow_components(config: Pretrain) -> FlowComponents:
    """The parts with fresh weights, which depend on the seed alone."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    # both text encoders have the same sizes
    words = text_config(config, caption_tokenizer(config.task))
    settings = config.denoiser

    # the weights depend on the seed alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return FlowComponents(
            transformer=SD3Transformer2DModel(
                sample_size=SIZE // 2,
                patch_size=_PATCH,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                num_layers=settings.layers,
                attention_head_dim=_HEAD,
                num_attention_heads=settings.width // _HEAD,
                joint_attention_dim=2 * settings.text_width,
                caption_projection_dim=settings.width,
                pooled_projection_dim=2 * settings.text_width,
                pos_embed_max_size=SIZE // 2 // _PATCH,
                qk_norm="rms_norm",
            ),
            text_encoder=CLIPTextModelWithProjection(words),
            text_encoder_2=CLIPTextModelWithProjection(words),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )


def levels(kind: str, count: int, rng: np.random.Generator) -> torch.Tensor:
    """(count,) float64 noise levels in (0, 1): uniform, or logistic of a standard normal (Esser
    2024, section 3.1)."""
    if kind == "logit_normal":
        return torch.sigmoid(torch.from_numpy(rng.standard_normal(count)))
    return RectifiedFlow().random_levels(rng.random(count))


def flow_loss(
    parts: torch.nn.ModuleDict,
    latents_NCHW: torch.Tensor,
    tokens_NL: torch.Tensor,
    empty_1L: torch.Tensor,
    config: Pretrain,
) -> Callable[[int], torch.Tensor]:
    """Update -> flow-matching loss on the update's own batch, noise, levels and dropped captions.

    Captions enter as ``encode_prompt`` of the pipeline gives them: the penultimate layers of both
    encoders side by side, and both projections; half of the samples with the 256 rows of zeros of a
    call without T5, half with none (``max_sequence_length=0``: a quarter of the tokens).
    """
    path = RectifiedFlow()
    transformer: Any = parts["transformer"]
    # no part of the weights, and not saved
    transformer.set_attn_processor(MaskedJointAttention())

    def loss(update: int) -> torch.Tensor:
        # which latents, at which levels, and whose captions are dropped
        settings = config.denoiser
        key = ("pretrain", config.seed, "denoiser", update)
        rng = generator(*key, "rows")
        rows_B = torch.from_numpy(rng.integers(len(latents_NCHW), size=settings.batch))
        level_B = levels(settings.levels, settings.batch, rng)
        dropped_B1 = torch.from_numpy(rng.random(settings.batch) < settings.caption_dropout)[
            :, None
        ]
        tokens_BL = torch.where(dropped_B1, empty_1L, tokens_NL[rows_B])
        # what the transformer is told
        read = [
            parts[name](tokens_BL, output_hidden_states=True)
            for name in ("text_encoder", "text_encoder_2")
        ]
        embeds_BLD = torch.cat([r.hidden_states[-2] for r in read], dim=-1)
        pooled_BD = torch.cat([r.text_embeds for r in read], dim=-1)
        clean_BCHW = latents_NCHW[rows_B]
        has_rows_B = torch.from_numpy(rng.random(settings.batch) < _ZERO_ROWS)
        embeds_BLD, mask = with_zero_row(
            embeds_BLD, clean_BCHW[0, 0].numel() // _PATCH**2, has_rows_B
        )

        def predict(x_BCHW: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
            told = {"joint_attention_kwargs": {"attention_mask": mask}, "return_dict": False}
            return transformer(x_BCHW, embeds_BLD, pooled_BD, timestep_B.float(), **told)[0]

        return denoising_loss(
            predict, clean_BCHW, normal((*key, "noise"), clean_BCHW.shape), level_B, path, "flow"
        )

    return loss


def write_flow_pipeline(parts: FlowComponents, vae: Any, task: Task, folder: Path) -> Path:
    """A Stable Diffusion 3 pipeline folder without T5, float32 safetensors."""
    from diffusers import StableDiffusion3Pipeline

    # the pipeline adds it, and cannot add None
    vae.register_to_config(shift_factor=vae.config.shift_factor or 0.0)
    # diffusers takes None here, its annotations do not
    absent: Any = None
    pipeline = StableDiffusion3Pipeline(
        **vars(parts),
        vae=vae,
        tokenizer=caption_tokenizer(task),
        tokenizer_2=caption_tokenizer(task),
        text_encoder_3=absent,
        tokenizer_3=absent,
    )
    return save_pipeline(pipeline, folder)
