"""What stands on this shelf: a ``Family`` says what a model family does, a ``PolicyRecipe`` names a
checkpoint of it, a ``Policy`` is one live.

Families of diffusers' pipelines share ``PipelineFamily`` and ``PipelineRecipe``.
"""

from __future__ import annotations

from rlalign.diffusion.condition import Condition as Condition
from rlalign.diffusion.condition import Words as Words
from rlalign.policies._clips import ClipFamily, ClipRecipe
from rlalign.policies._family import LATENTS, OWN_SIZE, WHOLE, Family, Part, refuse_frames
from rlalign.policies._pipeline import (
    ATTENTION_TARGETS,
    JOINT_TARGETS,
    PipelineFamily,
)
from rlalign.policies._pipeline_recipe import NegativePrompt, PipelineRecipe
from rlalign.policies._policy import Meter, Policy
from rlalign.policies._recipe import PolicyRecipe
from rlalign.policies._unet import UNetFamily

__all__ = [
    "ATTENTION_TARGETS",
    "JOINT_TARGETS",
    "LATENTS",
    "OWN_SIZE",
    "WHOLE",
    "ClipFamily",
    "ClipRecipe",
    "Family",
    "Meter",
    "NegativePrompt",
    "Part",
    "PipelineFamily",
    "PipelineRecipe",
    "Policy",
    "PolicyRecipe",
    "UNetFamily",
    "refuse_frames",
]
