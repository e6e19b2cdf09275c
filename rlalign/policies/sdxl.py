"""Stable Diffusion XL: any checkpoint in the format of diffusers' StableDiffusionXLPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from rlalign.diffusion.condition import Words
from rlalign.diffusion.paths import NoisePath
from rlalign.diffusion.predictions import PredictionType
from rlalign.networks.pipelines.fitting import check_unet_xl
from rlalign.networks.pipelines.schedulers import (
    check_variance_preserving,
    read_variance_preserving,
)
from rlalign.policies.base import PipelineRecipe, UNetFamily


class StableDiffusionXLFamily(UNetFamily):
    """A live Stable Diffusion XL pipeline: a UNet that is told two encoders' words, the second
    one's pooled vector, and sizes.

    It has two empty captions. Guidance goes away from zeros, where the pipeline says so
    (``force_zeros_for_empty_prompt``) and no negative prompt is given; caption dropout puts in the
    encoded "".
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    # a watermark would be in the picture of some machines and not of others
    pipeline_settings: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        check_unet_xl(pipeline, path)
        check_variance_preserving(pipeline.scheduler, path)

    def read_path(self) -> tuple[NoisePath, PredictionType]:
        scheduler = self.pipeline.scheduler
        # Euler, which the published folder has, ends at noise 0 whatever the set_alpha_to_one that
        # stands beside it says; DDIM and PNDM read it
        ends_clean = None if hasattr(scheduler, "final_alpha_cumprod") else True
        path = read_variance_preserving(scheduler, ends_clean=ends_clean)
        return path, scheduler.config.prediction_type

    @property
    def trial_side(self) -> int:
        """One latent at the coarsest level of a UNet of four."""
        return 8

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        embeds_BLD, _, pooled_BD, _ = self.pipeline.encode_prompt(
            text, device=self.device, do_classifier_free_guidance=False
        )
        return {"embeds_BLD": embeds_BLD, "pooled_BD": pooled_BD}

    def against(self, caption: Words) -> Words | None:
        if self.recipe.negative_prompt or not self.pipeline.config.force_zeros_for_empty_prompt:
            return super().against(caption)
        return Words({name: torch.zeros_like(rows) for name, rows in caption.tensors.items()})

    def tell_crops(self, words: Words, crops_B4: torch.Tensor, size: tuple[int, int]) -> Words:
        drawn_B2 = torch.tensor(size).expand(len(crops_B4), -1)
        time_ids_B6 = torch.cat([crops_B4, drawn_B2], dim=1).to(self.device)
        return Words({**words.tensors, "time_ids_B6": time_ids_B6})

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        # the size of the original picture, where it was cut, and the size that is drawn
        time_ids_B6 = words.tensors.get("time_ids_B6")
        if time_ids_B6 is None:
            height, width = (side * self.factor for side in x.shape[-2:])
            time_ids_6 = torch.tensor([height, width, 0, 0, height, width], device=x.device)
            time_ids_B6 = time_ids_6.expand(len(x), -1)
        told = {"text_embeds": words["pooled_BD"], "time_ids": time_ids_B6.to(x.dtype)}
        return self.network(
            x,
            timestep_B,
            encoder_hidden_states=words["embeds_BLD"],
            added_cond_kwargs=told,
            return_dict=False,
        )[0]


class StableDiffusionXL(PipelineRecipe):
    """A Stable Diffusion XL checkpoint (UNet, epsilon or v prediction) from a folder or a hub id.

    Source: Podell 2023, arXiv:2307.01952.
    """

    family = StableDiffusionXLFamily
