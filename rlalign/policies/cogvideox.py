"""CogVideoX: any checkpoint in the format of diffusers' CogVideoXPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from rlalign.diffusion.condition import Words
from rlalign.diffusion.paths import NoisePath
from rlalign.diffusion.predictions import PredictionType
from rlalign.networks.pipelines.fitting import check_settings
from rlalign.networks.pipelines.schedulers import (
    COGVIDEOX,
    check_variance_preserving,
    read_variance_preserving,
)
from rlalign.policies.base import ATTENTION_TARGETS, ClipFamily, ClipRecipe

LATENTS_AT_ONCE = 2
"""Frames of latents that the decoder takes at once, after the first: their number is odd."""


class CogVideoXFamily(ClipFamily):
    """A live CogVideoX pipeline: a transformer of clips on a variance-preserving path that ends
    without signal, told T5's words without a mask.

    Latents are (B, 16, F', H / 8, W / 8); the transformer's (B, F', 16, ...) stay inside
    ``predict``. In 1.5, whose tokens are two frames deep, an even number of frames is drawn: one
    more stands before the first, and is not decoded.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("CogVideoXPipeline",)
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("CogVideoXTransformer3DModel",),
        "vae": ("AutoencoderKLCogVideoX",),
        "tokenizer": (),
        "text_encoder": ("T5EncoderModel",),
    }
    lora_targets = ATTENTION_TARGETS

    recipe: CogVideoX

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        super().check(pipeline, path)
        alone = {
            "patch_size_t": (None, 2),
            "ofs_embed_dim": (None,),
            "use_learned_positional_embeddings": (False,),
        }
        check_settings(pipeline, path, cls.part, alone)
        check_variance_preserving(pipeline.scheduler, path, kinds=COGVIDEOX)

    def read_path(self) -> tuple[NoisePath, PredictionType]:
        scheduler = self.pipeline.scheduler
        return read_variance_preserving(scheduler), scheduler.config.prediction_type

    @property
    def frame_unit(self) -> int:
        return LATENTS_AT_ONCE * self.frame_factor

    @property
    def frames_before(self) -> int:
        """Frames of latents before the first that is decoded."""
        return (self.network.config.patch_size_t or 1) - 1

    def latent_frames(self, frames: int) -> int:
        return super().latent_frames(frames) + self.frames_before

    def own_size(self) -> tuple[int, int]:
        config = self.network.config
        return config.sample_height * self.factor, config.sample_width * self.factor

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        embeds_BLD, _ = self.pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.network.config.max_text_seq_length,
        )
        return {"embeds_BLD": embeds_BLD}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        frames, height, width = x.shape[-3:]
        places = None
        if self.network.config.use_rotary_positional_embeddings:
            places = self.pipeline._prepare_rotary_positional_embeddings(
                height * self.factor, width * self.factor, frames, x.device
            )
        return self.network(
            hidden_states=x.transpose(1, 2),
            encoder_hidden_states=words["embeds_BLD"],
            timestep=timestep_B,
            image_rotary_emb=places,
            return_dict=False,
        )[0].transpose(1, 2)

    def run_decoder(self, scaled: torch.Tensor) -> torch.Tensor:
        return super().run_decoder(scaled[:, :, self.frames_before :])

    def _encoded(self, media_BFCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With copies of the first frame before it, as 1.5 was trained."""
        mode, deviation = super()._encoded(media_BFCHW)
        return self._repeat_first(mode), None if deviation is None else self._repeat_first(
            deviation
        )

    def _repeat_first(self, latents: torch.Tensor) -> torch.Tensor:
        first = latents[:, :, :1].expand(-1, -1, self.frames_before, -1, -1)
        return torch.cat([first, latents], dim=2)


class CogVideoX(ClipRecipe):
    """A CogVideoX checkpoint (transformer of clips, v prediction), 2B, 5B or 1.5, from a folder or
    a hub id.

    Source: Yang 2024, arXiv:2408.06072.
    """

    family = CogVideoXFamily
