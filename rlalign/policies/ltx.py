"""LTX-Video: any checkpoint in the format of diffusers' LTXPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.diffusion.condition import Words
from rlalign.networks.pipelines.fitting import check_settings
from rlalign.policies.base import ATTENTION_TARGETS, ClipFamily, ClipRecipe

NOISE_SEED = 0
"""Of the noise that a decoder of 0.9.1 adds."""


class LTXFamily(ClipFamily):
    """A live LTX-Video pipeline: a flow's transformer that is told T5's words with their mask, and
    where its tokens lie in seconds and pixels.

    Latents are (B, 128, F', H / 32, W / 32); each is a token. From 0.9.1 on the decoder is told a
    timestep, here always 0, at which no noise is mixed into the latents.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("LTXPipeline",)
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("LTXVideoTransformer3DModel",),
        "vae": ("AutoencoderKLLTXVideo",),
        "tokenizer": (),
        "text_encoder": ("T5EncoderModel",),
    }
    own_pixels: ClassVar[tuple[int, int]] = (512, 704)
    even_levels: ClassVar[bool] = True
    comfyui_keys = "diffusion_model."
    lora_targets = ATTENTION_TARGETS

    recipe: LTX

    def __init__(self, recipe: LTX, pipeline: Any, device: str) -> None:
        super().__init__(recipe, pipeline, device)
        repeat_noise(self.vae.decoder)

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        super().check(pipeline, path)
        check_settings(pipeline, path, cls.part, {"patch_size": (1,), "patch_size_t": (1,)})

    @property
    def factor(self) -> int:
        return self.pipeline.vae_spatial_compression_ratio

    @property
    def frame_factor(self) -> int:
        return self.pipeline.vae_temporal_compression_ratio

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        embeds_BLD, mask_BL, _, _ = self.pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.recipe.text_tokens,
        )
        return {"embeds_BLD": embeds_BLD, "mask_BL": mask_BL}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        frames, height, width = x.shape[-3:]
        seconds = self.frame_factor / self.recipe.frame_rate
        tokens_BND = self.network(
            hidden_states=x.flatten(2).transpose(1, 2),
            encoder_hidden_states=words["embeds_BLD"],
            timestep=timestep_B.float(),
            encoder_attention_mask=words["mask_BL"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(seconds, self.factor, self.factor),
            return_dict=False,
        )[0]
        return tokens_BND.transpose(1, 2).reshape(x.shape)

    def run_decoder(self, scaled: torch.Tensor) -> torch.Tensor:
        told = self.vae.config.timestep_conditioning
        timestep_B = scaled.new_zeros(len(scaled)) if told else None
        return self.vae.decode(scaled, timestep_B, return_dict=False)[0]

    def _scales(self, latents: torch.Tensor) -> tuple[Any, Any, float, float | None]:
        vae = self.vae
        statistics = (vae.latents_mean, vae.latents_std)
        mean, std = (t.to(latents).view(1, -1, 1, 1, 1) for t in statistics)
        return mean, std, vae.config.scaling_factor, None


def repeat_noise(decoder: torch.nn.Module) -> None:
    """From now on the layers of a decoder that add noise of their own, as those of 0.9.1 do, add
    the same each time: a clip depends on its latents alone."""
    for layer in decoder.modules():
        if getattr(layer, "per_channel_scale1", None) is not None:
            layer.register_forward_pre_hook(_with_generator)


def _with_generator(layer: torch.nn.Module, asked: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a layer (hidden states, timestep's embedding, generator), with a fresh
    generator."""
    hidden, embedding, *_ = asked
    return hidden, embedding, torch.Generator(hidden.device).manual_seed(NOISE_SEED)


class LTX(ClipRecipe):
    """An LTX-Video checkpoint (transformer of clips, rectified flow) from a folder or a hub id.

    Source: HaCohen 2024, arXiv:2501.00103.
    """

    family = LTXFamily
    beside_words: ClassVar[tuple[str, ...]] = ("frame_rate",)

    frame_rate: float = Field(
        default=25.0,
        gt=0.0,
        description="frames a second that the transformer is told, as a call's frame_rate",
    )
    text_tokens: int = Field(
        default=128,
        ge=1,
        le=512,
        description="tokens of T5, as a call's max_sequence_length; masked beyond a prompt's end",
    )
