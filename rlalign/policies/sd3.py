"""Stable Diffusion 3 and 3.5: any checkpoint in the format of diffusers'
StableDiffusion3Pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.core.finite import refuse_pixels
from rlalign.core.locations import LocalPathOrHubId
from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.diffusion.paths import Tokens
from rlalign.networks.pipelines.fitting import check_transformer, try_out
from rlalign.networks.pipelines.loading import load_pipeline
from rlalign.networks.pipelines.schedulers import read_flow, say_steps
from rlalign.policies.base import PolicyRecipe, Words, refuse_frames
from rlalign.policies.stable_diffusion import NegativePrompt, StableDiffusionPolicy

LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
T5_TOKENS = 256
"""What a pipeline's call takes as ``max_sequence_length`` when it is not told."""
T5_MEANING = (
    "tokens of T5 (zeros where the pipeline has none), as a call's max_sequence_length; null: 0"
    " where it has none"
)
REMEMBERED_BYTES = 2**28
"""Of prompts' embeddings that are kept: 5.5 MB each in Stable Diffusion 3, so that a long prompt
list fills no memory."""


class StableDiffusion3(PolicyRecipe):
    """A Stable Diffusion 3 checkpoint (transformer, rectified flow) from a folder or a hub id.

    Source: Esser 2024, arXiv:2403.03206.
    """

    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)

    path: LocalPathOrHubId = Field(description="pipeline folder, or hub id")
    negative_prompt: NegativePrompt = ""
    t5_tokens: int | None = Field(default=256, ge=0, le=512, description=T5_MEANING)

    def load(self, device: str) -> StableDiffusion3Policy:
        """Loads safetensors weights alone; a missing, damaged or unknown checkpoint is a
        UserError."""
        pipeline = load_stable_diffusion_3(self.path, self.denoiser_dtype)
        policy = StableDiffusion3Policy(
            pipeline,
            device,
            **self.lora_settings,
            negative_prompt=self.negative_prompt,
            t5_tokens=self.t5_tokens,
        )
        return try_out(self.ready(policy), self.path, policy.network.config.patch_size)

    def announce(self) -> None:
        say_steps(self.path)


def load_stable_diffusion_3(path: str, dtype: torch.dtype) -> Any:
    """A Stable Diffusion 3 pipeline under ``path``, its denoiser in ``dtype``, checked: nothing in
    it that the policy would misread."""
    pipeline = load_pipeline(path, StableDiffusion3.pipeline_classes, {"transformer": dtype})
    check_transformer(pipeline, path)
    return pipeline


class StableDiffusion3Policy(StableDiffusionPolicy):
    """A live Stable Diffusion 3 pipeline as a policy."""

    part: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS

    def __init__(
        self,
        pipeline: Any,
        device: str,
        *,
        lora_rank: int = 0,
        lora_alpha: float = 0.0,
        adapter: str = "",
        negative_prompt: str = "",
        t5_tokens: int | None = T5_TOKENS,
    ) -> None:
        if t5_tokens is None:
            t5_tokens = 0 if pipeline.text_encoder_3 is None else T5_TOKENS
        self.t5_tokens = t5_tokens
        super().__init__(
            pipeline,
            device,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            adapter=adapter,
            negative_prompt=negative_prompt,
        )

    def _take_words_and_path(self) -> None:
        for encoder in (
            self.pipeline.text_encoder,
            self.pipeline.text_encoder_2,
            self.pipeline.text_encoder_3,
        ):
            if encoder is not None:
                encoder.to(self.device).eval().requires_grad_(False)
        scheduler = self.pipeline.scheduler
        side = self.pipeline.vae_scale_factor * self.network.config.patch_size
        own = self.own_size() if scheduler.config.get("use_dynamic_shifting") else None
        height, width = own or (0, 0)
        tokens = Tokens(side=side, height=height, width=width)
        self.path = read_flow(scheduler, self.folder, tokens)
        self.prediction = "flow"
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def _embed_both(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(L, D) and (D,), alone in the batch so that the numbers do not depend on its neighbours;
        kept for the next time."""
        kept = self._pairs.get(prompt)
        if kept is None:
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.t5_tokens,
            )
            kept = (embeds[0], pooled[0])
            if len(self._pairs) * kept[0].nbytes >= REMEMBERED_BYTES:
                self._pairs.clear()
            self._pairs[prompt] = kept
        return kept

    def words(self, texts: Sequence[str]) -> Words:
        embeds, pooled = zip(*(self._embed_both(text) for text in texts), strict=True)
        return Words({"embeds_BLD": torch.stack(embeds), "pooled_BD": torch.stack(pooled)})

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        # diffusers' scheduler hands its timesteps over in float32
        return self.network(
            hidden_states=x,
            timestep=timestep_B.float(),
            encoder_hidden_states=words["embeds_BLD"],
            pooled_projections=words["pooled_BD"],
            return_dict=False,
        )[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        pixels = self.vae.decode(
            latents / config.scaling_factor + config.shift_factor, return_dict=False
        )[0]
        refuse_pixels(pixels, latents)
        return (pixels / 2 + 0.5).clamp(0, 1).unsqueeze(1)

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        return (self._encoded_mode(media_BFCHW) - config.shift_factor) * config.scaling_factor

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        refuse_frames(plan)

        # whole patches of whole latents
        factor = self.pipeline.vae_scale_factor
        patch = self.network.config.patch_size
        height, width = self._pixels(plan)
        if height % (factor * patch) or width % (factor * patch):
            raise UserError(
                f"plan.height and plan.width must be multiples of {factor * patch}, got "
                f"{self._shown(plan, height, width)}"
            )

        # the transformer has positions up to a largest size
        largest = (self.network.config.pos_embed_max_size or 0) * factor * patch
        if largest and max(height, width) > largest:
            raise UserError(
                f"plan.height and plan.width must be at most {largest}, where the transformer's"
                f" pos_embed_max_size ends, got {self._shown(plan, height, width)}"
            )
        return (self.network.config.in_channels, height // factor, width // factor)

    def _lora_layers(self) -> dict[str, torch.Tensor]:
        from peft.utils import get_peft_model_state_dict

        # of a transformer the loader knows peft's own names only
        return get_peft_model_state_dict(self.network)
