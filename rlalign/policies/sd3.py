"""Stable Diffusion 3 and 3.5: any checkpoint in the format of diffusers' StableDiffusion3Pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.diffusion.paths import RectifiedFlow
from rlalign.policies.base import Condition, PolicyRecipe
from rlalign.policies.stable_diffusion import StableDiffusionPolicy, load_pipeline
from rlalign.records import Plan
from rlalign.registry import UserError

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
T5_TOKENS = 256
"""What a pipeline's call takes when it is not told."""
REMEMBERED_BYTES = 2**28
"""Of prompts' embeddings that are kept: 5.5 MB each in Stable Diffusion 3, so that a long prompt list fills no memory."""
OTHER_GRIDS = (
    "use_dynamic_shifting",
    "shift_terminal",
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)
"""Settings of a FlowMatchEuler scheduler that move its levels elsewhere than the shift alone does."""


class StableDiffusion3(PolicyRecipe):
    """A Stable Diffusion 3 checkpoint (transformer, rectified flow) from a folder or a hub id.

    Source: Esser 2024, arXiv:2403.03206.
    """

    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS

    path: str = Field(description="pipeline folder, or hub id")
    t5_tokens: int | None = Field(
        default=None,
        ge=0,
        le=512,
        description="tokens of T5 (zeros where the pipeline has none); left out: 256, or 0 where the pipeline has none",
    )

    def load(self, device: str) -> StableDiffusion3Policy:
        """Loads safetensors weights alone; a missing or damaged checkpoint is a UserError."""
        pipeline = load_pipeline(self.path, "StableDiffusion3Pipeline")
        return self.ready(
            StableDiffusion3Policy(
                pipeline, device, lora_rank=self.lora_rank, lora_alpha=self.lora_alpha, t5_tokens=self.t5_tokens
            )
        )


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
        t5_tokens: int | None = None,
    ) -> None:
        default = 0 if pipeline.text_encoder_3 is None else T5_TOKENS
        self.t5_tokens = default if t5_tokens is None else t5_tokens
        super().__init__(pipeline, device, lora_rank=lora_rank, lora_alpha=lora_alpha)

    def _take_words_and_path(self) -> None:
        scheduler = self.pipeline.scheduler.config
        odd = next((name for name in OTHER_GRIDS if scheduler.get(name)), None)
        if odd or "shift" not in scheduler:
            raise UserError(
                f"policy.path: the scheduler must be FlowMatchEulerDiscreteScheduler with a fixed shift, got "
                f"{scheduler.get('_class_name')}{f' with {odd}' if odd else ''}; set that in its scheduler_config.json"
            )
        for encoder in (self.pipeline.text_encoder, self.pipeline.text_encoder_2, self.pipeline.text_encoder_3):
            if encoder is not None:
                encoder.to(self.device).eval().requires_grad_(False)
        self.path = RectifiedFlow(shift=scheduler.shift, train_steps=scheduler.num_train_timesteps)
        self.prediction = "flow"
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def _embed_both(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(L, D) and (D,), alone in the batch so that the numbers do not depend on its neighbours; kept for the next time."""
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

    def encode(self, prompts: Sequence[str]) -> Condition:
        with self._reading:
            embeds, pooled = zip(*(self._embed_both(p) for p in prompts), strict=True)
            empty, empty_pooled = self._embed_both("")
        return Condition(
            embeds_BLD=torch.stack(embeds),
            uncond_BLD=torch.stack([empty] * len(prompts)),
            pooled_BD=torch.stack(pooled),
            uncond_pooled_BD=torch.stack([empty_pooled] * len(prompts)),
        )

    def predict(
        self,
        x: torch.Tensor,
        timestep_B: torch.Tensor,
        embeds_BLD: torch.Tensor,
        pooled_BD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # diffusers' scheduler hands its timesteps over in float32
        return self.network(
            hidden_states=x,
            timestep=timestep_B.float(),
            encoder_hidden_states=embeds_BLD,
            pooled_projections=pooled_BD,
            return_dict=False,
        )[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        pixels = self.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0.0), return_dict=False)[0]
        return (pixels / 2 + 0.5).clamp(0, 1).unsqueeze(1)

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        mode = self.vae.encode(media_BFCHW[:, 0] * 2 - 1).latent_dist.mode()
        return (mode - (config.shift_factor or 0.0)) * config.scaling_factor

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        factor, patch = self.pipeline.vae_scale_factor, self.network.config.patch_size
        size = self.network.config.sample_size * factor
        height, width = plan.height or size, plan.width or size
        if height % (factor * patch) or width % (factor * patch):
            raise UserError(f"plan.height and plan.width must be multiples of {factor * patch}, got {height} x {width}")
        return (self.network.config.in_channels, height // factor, width // factor)

    def _lora_layers(self) -> dict[str, torch.Tensor]:
        from peft.utils import get_peft_model_state_dict

        return get_peft_model_state_dict(self.network)  # of a transformer the loader knows peft's own names only
