"""FLUX.2-dev and FLUX.2-klein: any checkpoint in the format of diffusers' Flux2Pipeline or
Flux2KleinPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from rlalign.core.records import Plan, is_guided
from rlalign.core.registry import UserError
from rlalign.diffusion.condition import Words
from rlalign.diffusion.paths import NoisePath, RectifiedFlow, StepsShift
from rlalign.diffusion.predictions import PredictionType
from rlalign.networks.pipelines.packing import places
from rlalign.policies.base import JOINT_TARGETS, PipelineFamily, PipelineRecipe


class Flux2Family(PipelineFamily):
    """A live FLUX.2 pipeline: a flow's transformer that is told three hidden states of one text
    encoder and, in the guidance-distilled dev, how much guidance it is to imitate.

    Latents are (B, 128, H/16, W/16): 2 x 2 of the autoencoder's, normalised by its BatchNorm.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("Flux2Pipeline", "Flux2KleinPipeline")
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("Flux2Transformer2DModel",),
        "vae": ("AutoencoderKLFlux2",),
        "tokenizer": (),
        "text_encoder": (),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    }
    own_side: ClassVar[int] = 64
    even_levels: ClassVar[bool] = True
    comfyui_keys = "transformer."

    recipe: Flux2

    @property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]  # as many as blocks
        """Single blocks have their projections in one layer; that of their answer is named in full,
        as its name is also that of a list in the joint blocks."""
        blocks = range(self.network.config.num_single_layers)
        answers = (f"single_transformer_blocks.{i}.attn.to_out" for i in blocks)
        return (*JOINT_TARGETS, "to_qkv_mlp_proj", *answers)

    @property
    def factor(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    @property
    def _is_dev(self) -> bool:
        return type(self.pipeline).__name__ == "Flux2Pipeline"

    def read_path(self) -> tuple[NoisePath, PredictionType]:
        path, prediction = super().read_path()
        assert isinstance(path, RectifiedFlow)
        if (line := path.moving) is None:
            return path, prediction
        shift = StepsShift(tokens=line.tokens, exponential=line.exponential)
        return replace(path, moving=shift), prediction

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        if is_guided(plan.guidance) and self.pipeline.config.get("is_distilled", True):
            instead = "set policy.embedded_guidance" if self._is_dev else "it imitates one"
            raise UserError(
                f"plan.guidance must be 1 for {self.folder!r}, a distilled model that has no"
                f" classifier-free guidance, got {plan.guidance:g}; {instead}"
            )
        return super().latent_shape(plan)

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        embeds_BLD, _ = self.pipeline.encode_prompt(
            text, device=self.device, max_sequence_length=self.recipe.text_tokens
        )
        return {"embeds_BLD": embeds_BLD}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        embeds_BLD = words["embeds_BLD"]
        guidance_B = None
        if self._is_dev:
            guidance_B = torch.full((len(x),), self.recipe.embedded_guidance, device=x.device)
        tokens_BND = self.network(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=timestep_B.float() / 1000,
            guidance=guidance_B,
            encoder_hidden_states=embeds_BLD,
            txt_ids=places(1, 1, embeds_BLD.shape[1], device=x.device),
            img_ids=places(x.shape[-2], x.shape[-1], 1, device=x.device),
            return_dict=False,
        )[0]
        return tokens_BND.transpose(1, 2).reshape(x.shape)

    def to_autoencoder(self, latents: torch.Tensor) -> torch.Tensor:
        return pixel_shuffle(super().to_autoencoder(latents), 2)

    def from_autoencoder(self, latents: torch.Tensor) -> torch.Tensor:
        return super().from_autoencoder(pixel_unshuffle(latents, 2))

    def _scales(self, latents: torch.Tensor) -> tuple[Any, Any, float, float | None]:
        norm = self.vae.bn
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        mean, std = (t.to(latents).reshape(1, -1, 1, 1) for t in (norm.running_mean, std))
        return mean, std, 1.0, None


class Flux2(PipelineRecipe):
    """A FLUX.2 checkpoint (transformer, rectified flow), dev or klein, from a folder or a hub id.

    Source: Black Forest Labs 2025, https://bfl.ai/blog/flux-2.
    """

    family = Flux2Family
    beside_words: ClassVar[tuple[str, ...]] = ("embedded_guidance",)

    embedded_guidance: float = Field(
        default=4.0,
        ge=0.0,
        description="the guidance that dev's transformer is told, as a call's guidance_scale",
    )
    text_tokens: int = Field(
        default=512,
        ge=1,
        le=512,
        description="tokens of a prompt, as a call's max_sequence_length; nothing is masked",
    )
