"""How much people like a picture, whatever it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field

from rlalign.core.locations import ArchitecturePath, LocalPathOrHubId
from rlalign.core.registry import UserError
from rlalign.networks.towers import hub_file, published_towers
from rlalign.rewards.base import Reward, Scorer

_LAYERS = (0, 2, 4, 6, 7)
"""Places of the linear layers in the published module; between them dropout, and no activations:
the head is affine."""


class Aesthetic(Reward):
    """LAION's aesthetic predictor: an affine head on the unit vector of a picture in CLIP ViT-L/14,
    about 1 to 10.

    Typical pictures of Stable Diffusion 1.5 score 5 to 6. The published head is a pickle, which
    ``rlalign convert`` turns into safetensors. Gradients reach the picture.

    Weights: the head sac+logos+ava1-l14-linearMSE.pth of
    github.com/christophschuhmann/improved-aesthetic-predictor, through rlalign convert; the CLIP of
    hub id timm/vit_large_patch14_clip_224.openai as it is.

    Source: Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-predictor; as a reward:
    Black 2023, arXiv:2305.13301, section 5.
    """

    differentiable: ClassVar[bool] = True

    head: LocalPathOrHubId = Field(description="the head's tensors, a .safetensors file")
    architecture: ArchitecturePath = "ViT-L-14-quickgelu"
    weights: LocalPathOrHubId = Field(
        default="timm/vit_large_patch14_clip_224.openai",
        description="a .safetensors file, or a hub id with open_clip_model.safetensors",
    )

    def load(self, device: str) -> Scorer:
        """The scorer, its weights frozen. A missing or foreign file is a UserError."""
        place = f"rewards.{self.title}"
        towers = published_towers(self.architecture, self.weights, place, device)
        weight_D, bias = read_head(self.head, f"{place}.head")
        weight_D = weight_D.to(device)
        bias = bias.to(device)

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            unit_BFD = towers.images(media_BFCHW)
            if unit_BFD.shape[-1] != len(weight_D):
                raise UserError(
                    f"{place}.head is for vectors of {len(weight_D)} numbers, and"
                    f" {self.architecture} gives {unit_BFD.shape[-1]}"
                )
            return (unit_BFD @ weight_D + bias).mean(1)

        return scorer


def read_head(name: str, place: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's layers as the one affine map that they are: weight (D,) and bias, float32 through
    float64."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = hub_file(name, "model.safetensors", place)
    try:
        return affine_head(load_file(file))
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{place} must be a .safetensors file with layers.N.weight and layers.N.bias, N in"
            f" {_LAYERS}, got {name!r}: {error}"
        ) from error


def affine_head(
    tensors: Mapping[str, torch.Tensor], prefix: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """The one affine map of ``{prefix}layers.N``: weight (D,) and bias, float32 through float64. A
    missing one is a KeyError."""
    names = [f"{prefix}layers.{n}" for n in _LAYERS]
    weights = [tensors[f"{name}.weight"].double() for name in names]
    biases = [tensors[f"{name}.bias"].double() for name in names]
    weight = weights[0]
    bias = biases[0]
    for w, b in zip(weights[1:], biases[1:], strict=True):
        weight = w @ weight
        bias = w @ bias + b
    return weight[0].float(), bias[0].float()
