"""Sana: any checkpoint in the format of diffusers' SanaPipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.core.records import Plan
from rlalign.diffusion.condition import Condition, Words
from rlalign.policies.base import ATTENTION_TARGETS, OWN_SIZE, PipelineFamily, PipelineRecipe


class SanaFamily(PipelineFamily):
    """A live Sana pipeline: a flow's transformer with linear attention, that is told one text
    encoder's words with their mask.

    A caption is read after an instruction to enhance it (``complex_human_instruction``), whose own
    words are cut away but for the first; the empty and the negative prompt are read alone.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("SanaPipeline",)
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("SanaTransformer2DModel",),
        "vae": ("AutoencoderDC",),
        "tokenizer": (),
        "text_encoder": (),
    }
    lora_targets = ATTENTION_TARGETS

    recipe: Sana

    def __init__(self, recipe: Sana, pipeline: Any, device: str) -> None:
        super().__init__(recipe, pipeline, device)
        call = inspect.signature(pipeline.__call__)
        own = call.parameters["complex_human_instruction"].default
        self.instruction: list[str] = list(own) if recipe.instruction else []
        """Lines that a caption is read after; a caption's text begins with them for ``read``."""

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        lines = "\n".join(self.instruction)
        caption = self.words([lines + prompt for prompt in prompts])
        empty = self.words([""] * len(prompts))
        return Condition(caption=caption, empty=empty, against=self.against(caption))

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        lines = "\n".join(self.instruction)
        instructed = bool(lines) and text.startswith(lines)
        embeds_BLD, mask_BL, _, _ = self.pipeline.encode_prompt(
            text.removeprefix(lines),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.recipe.text_tokens,
            complex_human_instruction=self.instruction if instructed else None,
        )
        return {"embeds_BLD": embeds_BLD, "mask_BL": mask_BL.bool()}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        return self.network(
            x,
            encoder_hidden_states=words["embeds_BLD"],
            encoder_attention_mask=words["mask_BL"],
            timestep=timestep_B.float() * self.network.config.timestep_scale,
            return_dict=False,
        )[0]


class Sana(PipelineRecipe):
    """A Sana checkpoint (linear transformer, rectified flow) from a folder or a hub id.

    Source: Xie 2024, arXiv:2410.10629.
    """

    family = SanaFamily

    instruction: bool = Field(
        default=True,
        description=(
            "whether captions are read after the pipeline's own complex_human_instruction, as its"
            " calls do"
        ),
    )
    text_tokens: int = Field(
        default=300,
        ge=2,
        le=300,
        description="tokens of a prompt, as a call's max_sequence_length; masked beyond its end",
    )
