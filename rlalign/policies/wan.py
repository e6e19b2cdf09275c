"""Wan 2.1 and 2.2: any checkpoint in the format of diffusers' WanPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.diffusion.condition import Words
from rlalign.networks.pipelines.fitting import check_patches
from rlalign.policies._clips import ClipFamily, ClipRecipe
from rlalign.policies._experts import ExpertsFamily, ExpertsRecipe
from rlalign.policies.base import ATTENTION_TARGETS

CHUNK = 4
"""Frames that the autoencoder encodes at once, after the first, whatever its factor is."""


class WanFamily(ExpertsFamily, ClipFamily):
    """A live Wan pipeline: a flow's transformer of clips that is told one text encoder's words.

    Latents are (C, F', H', W') with F' = (F - 1) / 4 + 1: the first frame has a latent of its own.
    Prompts have one width, filled up with zeros that the transformer attends.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("WanTransformer3DModel",),
        "vae": ("AutoencoderKLWan",),
        "tokenizer": (),
        "text_encoder": (),
    }
    own_pixels: ClassVar[tuple[int, int]] = (480, 832)
    lora_targets = ATTENTION_TARGETS

    recipe: Wan

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        super().check(pipeline, path)
        check_patches(pipeline, path, cls.part)

    @property
    def channels(self) -> int:
        return self.vae.config.z_dim

    @property
    def patch(self) -> int:
        return self.network.config.patch_size[1]

    @property
    def frame_unit(self) -> int:
        return max(CHUNK, self.frame_factor)

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        channels, frames, height, width = super().latent_shape(plan)
        self._refuse_beyond_positions(frames, height, width)
        return (channels, frames, height, width)

    def _refuse_beyond_positions(self, frames: int, height: int, width: int) -> None:
        """Raises UserError where the transformer's table of positions ends before the latents."""
        most = self.network.config.rope_max_seq_len
        longest = max(frames, height // self.patch, width // self.patch)
        if longest > most:
            raise UserError(
                f"plan.height and plan.width must be at most {most * self.patch * self.factor},"
                f" and the latents at most {most} frames, where the transformer's rope_max_seq_len"
                f" ends, got {height * self.factor} x {width * self.factor} and {frames}"
            )

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        embeds_BLD, _ = self.pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.recipe.text_tokens,
        )
        return {"embeds_BLD": embeds_BLD}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        return self.ask_experts(ask_one, timestep_B, x, words["embeds_BLD"])


def ask_one(
    network: Any,
    timestep_B: torch.Tensor,
    x: torch.Tensor,
    embeds_BLD: torch.Tensor,
    picture_BLD: torch.Tensor | None = None,
) -> torch.Tensor:
    """What one transformer says of some rows, told the words of texts and of pictures."""
    return network(
        hidden_states=x,
        timestep=timestep_B.float(),
        encoder_hidden_states=embeds_BLD,
        encoder_hidden_states_image=picture_BLD,
        return_dict=False,
    )[0]


class Wan(ExpertsRecipe, ClipRecipe):
    """A Wan checkpoint (transformer of clips, rectified flow) from a folder or a hub id.

    Source: Wan Team 2025, arXiv:2503.20314.
    """

    family = WanFamily

    text_tokens: int = Field(
        default=512,
        ge=1,
        le=512,
        description="tokens of a prompt, as a call's max_sequence_length; nothing is masked",
    )
