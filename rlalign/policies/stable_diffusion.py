"""Stable Diffusion 1.x and 2.x: any checkpoint in the format of diffusers'
StableDiffusionPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from rlalign.diffusion.condition import Words
from rlalign.diffusion.paths import NoisePath
from rlalign.diffusion.predictions import PredictionType
from rlalign.networks.pipelines.fitting import check_unet
from rlalign.networks.pipelines.schedulers import (
    check_variance_preserving,
    read_variance_preserving,
)
from rlalign.policies.base import PipelineRecipe, UNetFamily


class StableDiffusionFamily(UNetFamily):
    """A live Stable Diffusion pipeline: a UNet that is told the words of one text encoder."""

    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    pipeline_settings: ClassVar[Mapping[str, Any]] = {"safety_checker": None}

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        check_unet(pipeline, path)
        check_variance_preserving(pipeline.scheduler, path)

    def read_path(self) -> tuple[NoisePath, PredictionType]:
        scheduler = self.pipeline.scheduler
        return read_variance_preserving(scheduler), scheduler.config.prediction_type

    @property
    def trial_side(self) -> int:
        """One latent at the coarsest level of a UNet of four."""
        return 8

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        # a prompt is cut to the length that the encoder reads
        tokenizer = self.pipeline.tokenizer
        encoder = self.pipeline.text_encoder
        tokens = tokenizer(
            text,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        masked = encoder.config.to_dict().get("use_attention_mask")
        mask = tokens.attention_mask if masked else None
        return {"embeds_BLD": encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        embeds_BLD = words["embeds_BLD"]
        return self.network(x, timestep_B, encoder_hidden_states=embeds_BLD, return_dict=False)[0]


class StableDiffusion(PipelineRecipe):
    """A Stable Diffusion 1.x or 2.x checkpoint (UNet, epsilon or v prediction) from a folder or a
    hub id.

    Source: Rombach 2022, arXiv:2112.10752.
    """

    family = StableDiffusionFamily
