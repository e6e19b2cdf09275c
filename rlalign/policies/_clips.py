"""What the families of clips share: latents with frames, of which the first has one of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from rlalign.core.records import Plan
from rlalign.core.registry import Before, UserError
from rlalign.diffusion.paths import NoisePath, RectifiedFlow
from rlalign.diffusion.predictions import PredictionType
from rlalign.policies._pipeline import PipelineFamily
from rlalign.policies._pipeline_recipe import PipelineRecipe


class ClipRecipe(PipelineRecipe):
    """Base of the settings of a family of clips: how its autoencoder decodes them."""

    vae_tile: Annotated[int, Before(0)] = Field(
        default=0,
        ge=0,
        description=(
            "pixels of a tile's side under vae_tiling, of which neighbours share a quarter; 0 is"
            " diffusers' own size"
        ),
    )
    decode_frames: Annotated[int, Before(0)] = Field(
        default=0,
        ge=0,
        description=(
            "frames decoded at once, in runs that blend, of ltx and hunyuan_video: less memory, and"
            " other pixels; 0 is as the pipeline does it"
        ),
    )

    @property
    def word_settings(self) -> Mapping[str, str]:
        beside = {f"policy.{name}" for name in ("vae_tile", "decode_frames")}
        return {name: said for name, said in super().word_settings.items() if name not in beside}


class ClipFamily(PipelineFamily):
    """A diffusers pipeline of clips as a family: latents are (C, F', H', W'), where the F' - 1
    behind the first are ``frame_factor`` frames each."""

    draws_clips: ClassVar[bool] = True
    own_pixels: ClassVar[tuple[int, int]] = (0, 0)
    """(height, width) that a pipeline's call draws when it is not told."""

    recipe: ClipRecipe

    def __init__(self, recipe: ClipRecipe, pipeline: Any, device: str) -> None:
        super().__init__(recipe, pipeline, device)
        if recipe.vae_tile:
            self._set_tiles(recipe)
        if recipe.decode_frames:
            self._set_runs(recipe)

    def _set_tiles(self, recipe: ClipRecipe) -> None:
        """Tells the autoencoder how large its tiles are. Raises UserError."""
        unit, side = 4 * self.factor, recipe.vae_tile
        if side % unit or not recipe.vae_tiling:
            raise UserError(
                f"policy.vae_tile must be a multiple of {unit} for {self.folder!r}, beside"
                f" policy.vae_tiling: true, got {side} and {str(recipe.vae_tiling).lower()}"
            )
        # autoencoders say the shared part as a stride or as a share
        told = {"tile_sample_min": side, "tile_sample_stride": side - side // 4}
        told |= {"tile_overlap_factor": 0.25}
        known = inspect.signature(self.vae.enable_tiling).parameters
        both = {f"{n}_{way}": v for n, v in told.items() for way in ("height", "width")}
        self.vae.enable_tiling(**{name: value for name, value in both.items() if name in known})

    def _set_runs(self, recipe: ClipRecipe) -> None:
        """Tells the autoencoder how many frames it decodes at once. Raises UserError."""
        unit, frames = self.frame_factor, recipe.decode_frames
        if not hasattr(self.vae, "use_framewise_decoding"):
            raise UserError(
                f"policy.decode_frames must be 0 for {self.folder!r}, got {frames}: its autoencoder"
                " decodes a few frames after the others by itself, with the same pixels"
            )
        if frames % unit or frames < 2 * unit:
            raise UserError(
                f"policy.decode_frames must be a multiple of {unit}, of {2 * unit} or more, for"
                f" {self.folder!r}, got {frames}"
            )
        self.vae.use_framewise_decoding = True
        self.vae.tile_sample_min_num_frames = frames
        self.vae.tile_sample_stride_num_frames = frames - unit

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
