"""Qwen-Image: any checkpoint in the format of diffusers' QwenImagePipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn.functional import pad

from rlalign.diffusion.condition import Words
from rlalign.networks.pipelines.packing import pack, unpack
from rlalign.policies.base import JOINT_TARGETS, PipelineFamily, PipelineRecipe

TEXT_MEANING = (
    "tokens of a prompt, as a call's max_sequence_length; shorter prompts are filled up and masked,"
    " so fewer are cheaper"
)


class QwenImageFamily(PipelineFamily):
    """A live Qwen-Image pipeline: a flow's transformer of packed tokens that is told words of one
    width with their mask.

    diffusers pads prompts to the longest of a batch and tells no mask where nothing is padded;
    here the width is fixed and the mask is always told, so that a prompt has the same numbers, and
    the same kernel, whatever its neighbours are.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("QwenImageTransformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
        "tokenizer": (),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
    }
    own_side: ClassVar[int] = 128
    even_levels: ClassVar[bool] = True
    comfyui_keys = "lora_unet_"
    lora_targets = JOINT_TARGETS

    recipe: QwenImage

    @property
    def channels(self) -> int:
        return self.vae.config.z_dim

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        width = self.recipe.text_tokens
        embeds_BLD, _ = self.pipeline.encode_prompt(
            text, device=self.device, max_sequence_length=width
        )
        length = embeds_BLD.shape[1]
        mask_BL = torch.arange(width, device=self.device)[None] < length
        return {"embeds_BLD": pad(embeds_BLD, (0, 0, 0, width - length)), "mask_BL": mask_BL}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        height, width = x.shape[-2:]
        tokens = self.network(
            hidden_states=pack(x),
            timestep=timestep_B.float() / 1000,
            encoder_hidden_states=words["embeds_BLD"],
            encoder_hidden_states_mask=words["mask_BL"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(tokens, x.shape)

    def combine(self, cond: torch.Tensor, uncond: torch.Tensor, guidance: float) -> torch.Tensor:
        """Each guided token at the length of the caption's own, as in diffusers' pipeline."""
        caption = pack(cond)
        mixed = pack(super().combine(cond, uncond, guidance))
        scale = caption.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
        return unpack(mixed * scale, cond.shape)


class QwenImage(PipelineRecipe):
    """A Qwen-Image checkpoint (transformer, rectified flow) from a folder or a hub id.

    Source: Wu 2025, arXiv:2508.02324.
    """

    family = QwenImageFamily

    negative_prompt: str = Field(
        default=" ", description="what plan.guidance goes away from, as a call's negative_prompt"
    )
    text_tokens: int = Field(default=512, ge=1, le=1024, description=TEXT_MEANING)
