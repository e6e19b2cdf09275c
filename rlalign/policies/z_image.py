"""Z-Image and Z-Image-Turbo: any checkpoint in the format of diffusers' ZImagePipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn.functional import pad

from rlalign.diffusion.condition import Words
from rlalign.policies.base import ATTENTION_TARGETS, PipelineFamily, PipelineRecipe

OWN_SIZE = (1024, 1024)
"""Pixels that a pipeline's call draws when it is not told."""


class ZImageFamily(PipelineFamily):
    """A live Z-Image pipeline: a transformer of lists, which counts time from noise (0) to the
    picture (1) and answers with minus the flow's velocity.

    Inside, a caption is filled up to a multiple of 32 with a learned token that is attended, and
    the picture's places follow it: so a caption keeps its own length, and the mask says it.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("ZImageTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "tokenizer": (),
        "text_encoder": (),
    }
    even_levels: ClassVar[bool] = True
    comfyui_keys = "diffusion_model."
    lora_targets = ATTENTION_TARGETS

    recipe: ZImage

    @property
    def patch(self) -> int:
        return 2

    def own_size(self) -> tuple[int, int]:
        return OWN_SIZE

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        width = self.recipe.text_tokens
        (embeds_LD,), _ = self.pipeline.encode_prompt(
            text,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=width,
        )
        length = len(embeds_LD)
        mask_L = torch.arange(width, device=self.device) < length
        embeds_LD = pad(embeds_LD, (0, 0, 0, width - length))
        return {"embeds_BLD": embeds_LD[None], "mask_BL": mask_L[None]}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        rows = zip(words["embeds_BLD"], words["mask_BL"], strict=True)
        captions = [embeds_LD[mask_L] for embeds_LD, mask_L in rows]
        answers = self.network(
            list(x.unsqueeze(2).unbind()),
            (1000 - timestep_B.float()) / 1000,
            captions,
            return_dict=False,
        )[0]
        return -torch.stack(answers).squeeze(2)


class ZImage(PipelineRecipe):
    """A Z-Image checkpoint (transformer, rectified flow) from a folder or a hub id.

    A pipeline's guidance_scale g is plan.guidance g + 1: it counts from 0. Source: Z-Image Team
    2025, arXiv:2511.22699.
    """

    family = ZImageFamily

    text_tokens: int = Field(
        default=512,
        ge=1,
        le=512,
        description="most tokens of a prompt, as a call's max_sequence_length",
    )
