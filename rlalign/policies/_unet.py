"""What families with a UNet share: which part is trained, and what is known of its layers."""

from __future__ import annotations

from typing import ClassVar

from rlalign.policies._pipeline import ATTENTION_TARGETS, PipelineFamily


class UNetFamily(PipelineFamily):
    """Base of the families whose denoiser is a UNet."""

    part: ClassVar[str] = "unet"
    can_spread: ClassVar[bool] = False  # a UNet has no row of like blocks
    comfyui_keys = "lora_unet_"
    lora_targets = ATTENTION_TARGETS
