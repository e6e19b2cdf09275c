"""PixArt-Sigma and PixArt-Alpha: any checkpoint in the format of diffusers' PixArtSigmaPipeline or
PixArtAlphaPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.diffusion.condition import Words
from rlalign.diffusion.paths import NoisePath
from rlalign.diffusion.predictions import PredictionType
from rlalign.networks import lora
from rlalign.networks.pipelines.schedulers import (
    check_variance_preserving,
    read_variance_preserving,
)
from rlalign.policies.base import ATTENTION_TARGETS, PipelineFamily, PipelineRecipe

TEXT_TOKENS = {"PixArtSigmaPipeline": 300, "PixArtAlphaPipeline": 120}
"""Pipeline -> what its call takes as ``max_sequence_length`` when it is not told."""


class PixArtFamily(PipelineFamily):
    """A live PixArt pipeline: a transformer that predicts noise and its variance, told T5's words
    with their mask; and the picture's size in Alpha's at 1024 pixels.

    diffusers has no LoRA loader for these pipelines: one that is trained is saved merged, as a
    pipeline folder.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("PixArtTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "tokenizer": (),
        "text_encoder": ("T5EncoderModel",),
    }
    lora_targets = ATTENTION_TARGETS
    reads_adapters: ClassVar[bool] = False

    recipe: PixArt

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        super().check(pipeline, path)
        check_variance_preserving(pipeline.scheduler, path)

    def read_path(self) -> tuple[NoisePath, PredictionType]:
        # DPM-Solver, with which they ship, never asks at timestep 0
        scheduler = self.pipeline.scheduler
        beyond = int(type(scheduler).__name__ == "DPMSolverMultistepScheduler")
        path = read_variance_preserving(scheduler, beyond=beyond)
        return path, scheduler.config.prediction_type

    @property
    def text_tokens(self) -> int:
        """Rows of T5's embeddings."""
        return self.recipe.text_tokens or TEXT_TOKENS[type(self.pipeline).__name__]

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        embeds_BLD, mask_BL, _, _ = self.pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.text_tokens,
        )
        return {"embeds_BLD": embeds_BLD, "mask_BL": mask_BL.bool()}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        answer = self.network(
            x,
            encoder_hidden_states=words["embeds_BLD"],
            encoder_attention_mask=words["mask_BL"],
            timestep=timestep_B,
            added_cond_kwargs=self._size(x),
            return_dict=False,
        )[0]
        # the second half is the variance that it has learned
        return answer[:, : x.shape[1]]

    def _size(self, x: torch.Tensor) -> Mapping[str, torch.Tensor | None]:
        """What the transformer is told of the picture's size, in pixels."""
        if not self.network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.factor for side in x.shape[-2:])
        size = x.new_tensor([[height, width]], dtype=torch.float32)
        aspect = x.new_tensor([[height / width]], dtype=torch.float32)
        rows = len(x)
        return {"resolution": size.repeat(rows, 1), "aspect_ratio": aspect.repeat(rows, 1)}

    def save(self, folder: Path) -> None:
        """A pipeline folder, an adapter merged into it."""
        if lora.is_attached(self.network):
            self.save_merged(folder)
        else:
            super().save(folder)


class PixArt(PipelineRecipe):
    """A PixArt checkpoint (transformer, noise prediction), Sigma or Alpha, from a folder or a hub
    id.

    Source: Chen 2024, arXiv:2403.04692 (Sigma), arXiv:2310.00426 (Alpha).
    """

    family = PixArtFamily

    text_tokens: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description=(
            "tokens of T5, as a call's max_sequence_length; null: 300 for Sigma, 120 for Alpha"
        ),
    )
