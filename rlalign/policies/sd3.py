"""Stable Diffusion 3 and 3.5: any checkpoint in the format of diffusers'
StableDiffusion3Pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.diffusion.condition import Words
from rlalign.networks.pipelines.fitting import check_transformer
from rlalign.policies.base import JOINT_TARGETS, PipelineFamily, PipelineRecipe

T5_TOKENS = 256
"""What a pipeline's call takes as ``max_sequence_length`` when it is not told."""
T5_MEANING = (
    "tokens of T5 (zeros where the pipeline has none), as a call's max_sequence_length; null: 0"
    " where it has none"
)


class StableDiffusion3Family(PipelineFamily):
    """A live Stable Diffusion 3 pipeline: a flow's transformer that is told tokens and a pooled
    vector."""

    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    comfyui_keys = "transformer."
    lora_targets = JOINT_TARGETS

    recipe: StableDiffusion3

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        check_transformer(pipeline, path)

    @property
    def t5_tokens(self) -> int:
        """Rows of T5's embeddings, or of zeros in their place."""
        asked = self.recipe.t5_tokens
        if asked is not None:
            return asked
        return 0 if self.pipeline.text_encoder_3 is None else T5_TOKENS

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        embeds_BLD, _, pooled_BD, _ = self.pipeline.encode_prompt(
            text,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.t5_tokens,
        )
        return {"embeds_BLD": embeds_BLD, "pooled_BD": pooled_BD}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        # diffusers' scheduler hands its timesteps over in float32
        return self.network(
            hidden_states=x,
            timestep=timestep_B.float(),
            encoder_hidden_states=words["embeds_BLD"],
            pooled_projections=words["pooled_BD"],
            return_dict=False,
        )[0]


class StableDiffusion3(PipelineRecipe):
    """A Stable Diffusion 3 checkpoint (transformer, rectified flow) from a folder or a hub id.

    Source: Esser 2024, arXiv:2403.03206.
    """

    family = StableDiffusion3Family

    t5_tokens: int | None = Field(default=256, ge=0, le=512, description=T5_MEANING)
