"""What a policy is: a denoiser with its path, its words and its pictures, live in one process."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from rlalign.diffusion.paths import NoisePath, coefficients
from rlalign.diffusion.predictions import PredictionType, to_clean_and_noise
from rlalign.records import Plan
from rlalign.registry import Recipe


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the denoiser is told beside the latent."""

    embeds_BLD: torch.Tensor
    uncond_BLD: torch.Tensor
    """The same for the empty caption, for classifier-free guidance."""

    def rows(self, repeat: int) -> Condition:
        """The condition of a batch in which every sample appears ``repeat`` times in a row of blocks."""
        return Condition(
            embeds_BLD=self.embeds_BLD.repeat(repeat, 1, 1), uncond_BLD=self.uncond_BLD.repeat(repeat, 1, 1)
        )


class PolicyRecipe(Recipe):
    """Base of a model family: settings of the checkpoint and of what is trained in it."""

    shelf: ClassVar[str] = "policies"

    lora_rank: int = Field(default=0, ge=0, description="LoRA rank; 0 trains all weights of the denoiser")
    lora_alpha: float = Field(default=0.0, ge=0.0, description="LoRA scale numerator; 0 means equal to the rank")

    def load(self, device: str) -> Policy:
        """The live policy on ``device``, in evaluation mode, float32."""
        raise NotImplementedError


class Policy(ABC):
    """A live policy. Families implement the abstract verbs; the rest is shared."""

    path: NoisePath
    prediction: PredictionType
    network: torch.nn.Module
    """The denoiser: what is trained."""
    device: str

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt; a prompt's rows do not depend on its neighbours in the batch."""

    @abstractmethod
    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, embeds_BLD: torch.Tensor) -> torch.Tensor:
        """The network's raw output for latents (B, C, H, W)."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Clean latents (B, C, H, W) -> media (B, F, 3, H, W) float32 in [0, 1]."""

    @abstractmethod
    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        """Media in [0, 1] -> clean latents: the mean of the encoder's posterior."""

    @abstractmethod
    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        """Shape of one sample's latent under a plan."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what plain diffusers loads: a pipeline folder, or a LoRA file."""

    def denoise(
        self, x: torch.Tensor, level: torch.Tensor, condition: Condition, guidance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(clean, noise) that the policy sees in ``x``; level is a scalar or (B,).

        Guidance w is uncond + w * (cond - uncond) on the raw prediction (Ho & Salimans 2022, arXiv:2207.12598), one pass of
        2B rows; the gradient flows through both halves. w = 1 is one pass of B rows.
        """
        rows = x.shape[0]
        timestep_B = self.path.timestep(level).to(x.device).expand(rows)
        if guidance == 1.0:
            prediction = self.predict(x, timestep_B, condition.embeds_BLD)
        else:
            both = torch.cat([condition.uncond_BLD, condition.embeds_BLD])
            output = self.predict(torch.cat([x, x]), torch.cat([timestep_B, timestep_B]), both)
            uncond, cond = output.chunk(2)
            prediction = uncond + guidance * (cond - uncond)
        alpha, sigma = coefficients(self.path, level, x)
        return to_clean_and_noise(prediction, x, alpha, sigma, self.prediction)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Name -> parameter of what is trained, in a fixed order."""
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    def replica(self) -> Policy:
        """A second policy on the same weights (updates in place reach both) with gradients of its own: one per thread."""
        twin = copy.copy(self)
        twin.network = copy.deepcopy(self.network)
        for mine, other in zip(self.network.parameters(), twin.network.parameters(), strict=True):
            other.data = mine.data
        return twin

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the trainable weights: what a rollout worker needs to become this version."""
        return {n: p.detach().clone() for n, p in self.trainable().items()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Takes over trainable weights; names and shapes must match."""
        own = self.trainable()
        assert own.keys() == weights.keys(), f"weights differ in {sorted(own.keys() ^ weights.keys())[:3]}"
        for name, parameter in own.items():
            parameter.copy_(weights[name])

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the policy is the pretrained one: the adapter off (LoRA), or a kept copy of the weights swapped in."""
        from rlalign import lora

        with lora.disabled(self.network) if lora.is_attached(self.network) else self._swapped():
            yield

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        # pointers move, numbers do not: other replicas on these weights, and graphs built before, stay as they are
        own = self.trainable()
        assert own.keys() == self.reference.keys(), "this policy keeps no reference"
        current = {name: parameter.data for name, parameter in own.items()}
        for name, parameter in own.items():
            parameter.data = self.reference[name]
        try:
            yield
        finally:
            for name, parameter in own.items():
                parameter.data = current[name]

    reference: dict[str, torch.Tensor]
    """The pretrained trainable weights; empty with LoRA, whose reference is the adapter switched off."""
