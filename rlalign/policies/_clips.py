"""What the families of clips share: latents with frames, of which the first has one of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.diffusion.paths import NoisePath, RectifiedFlow
from rlalign.diffusion.predictions import PredictionType
from rlalign.policies._pipeline import PipelineFamily


class ClipFamily(PipelineFamily):
    """A diffusers pipeline of clips as a family: latents are (C, F', H', W'), where the F' - 1
    behind the first are ``frame_factor`` frames each."""

    draws_clips: ClassVar[bool] = True
    own_pixels: ClassVar[tuple[int, int]] = (0, 0)
    """(height, width) that a pipeline's call draws when it is not told."""

    @property
    def factor(self) -> int:
        return self.pipeline.vae_scale_factor_spatial

    @property
    def frame_factor(self) -> int:
        """Frames of a latent, after a clip's first."""
        return self.pipeline.vae_scale_factor_temporal

    @property
    def frame_unit(self) -> int:
        """Frames between two numbers of frames that can be drawn."""
        return self.frame_factor

    @property
    def trial_frames(self) -> int:
        return 1 + self.frame_unit

    def own_size(self) -> tuple[int, int] | None:
        return self.own_pixels

    def read_path(self) -> tuple[NoisePath, PredictionType]:
        """A shift that follows the size follows the frames too."""
        path, prediction = super().read_path()
        if isinstance(path, RectifiedFlow) and (moving := path.moving):
            tokens = replace(moving.tokens, frames=self.frame_factor)
            path = replace(path, moving=replace(moving, tokens=tokens))
        return path, prediction

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        channels, height, width = super().latent_shape(plan.model_copy(update={"frames": 1}))
        units, rest = divmod(plan.frames - 1, self.frame_unit)
        if rest:
            unit = self.frame_unit
            below = units * unit + 1
            raise UserError(
                f"plan.frames must be {unit}n + 1 for {self.folder!r} (1, {unit + 1},"
                f" {2 * unit + 1} and so on), got {plan.frames}; take {below} or {below + unit}"
            )
        return (channels, self.latent_frames(plan.frames), height, width)

    def latent_frames(self, frames: int) -> int:
        """F' of F frames."""
        return (frames - 1) // self.frame_factor + 1

    def first_frames(self, latents: torch.Tensor, frames: int) -> torch.Tensor:
        """A causal autoencoder decodes them as it does within the whole clip."""
        return latents[:, :, : self.latent_frames(frames)]
