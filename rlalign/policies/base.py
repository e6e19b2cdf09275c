"""What a policy is: a denoiser with its path, its words and its pictures, live in one process."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, TypeVar

import torch
from pydantic import Field

from rlalign.diffusion.paths import NoisePath, coefficients
from rlalign.diffusion.predictions import PredictionType, target, to_clean_and_noise
from rlalign.precision import Precision, autocast, keep_frozen, settle
from rlalign.records import Plan
from rlalign.registry import Recipe, UserError


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the denoiser is told beside the latent."""

    embeds_BLD: torch.Tensor
    uncond_BLD: torch.Tensor
    """The same for the empty caption, for classifier-free guidance."""
    pooled_BD: torch.Tensor | None = None
    """One vector a caption, where the family has it."""
    uncond_pooled_BD: torch.Tensor | None = None

    def rows(self, repeat: int) -> Condition:
        """The condition of a batch in which every sample appears ``repeat`` times in a row of blocks."""
        return Condition(
            embeds_BLD=self.embeds_BLD.repeat(repeat, 1, 1),
            uncond_BLD=self.uncond_BLD.repeat(repeat, 1, 1),
            pooled_BD=self.pooled_BD.repeat(repeat, 1) if self.pooled_BD is not None else None,
            uncond_pooled_BD=self.uncond_pooled_BD.repeat(repeat, 1) if self.uncond_pooled_BD is not None else None,
        )

    def dropped(self, empty_B: torch.Tensor) -> Condition:
        """The condition with the empty caption where ``empty_B`` (bool) says so: caption dropout."""
        mask_B1 = empty_B.to(self.embeds_BLD.device)[:, None]
        pooled_BD = self.pooled_BD
        if pooled_BD is not None and self.uncond_pooled_BD is not None:
            pooled_BD = torch.where(mask_B1, self.uncond_pooled_BD, pooled_BD)
        embeds_BLD = torch.where(mask_B1[:, :, None], self.uncond_BLD, self.embeds_BLD)
        return replace(self, embeds_BLD=embeds_BLD, pooled_BD=pooled_BD)


AnyPolicy = TypeVar("AnyPolicy", bound="Policy")


class PolicyRecipe(Recipe):
    """Base of a model family: settings of the checkpoint and of what is trained in it."""

    shelf: ClassVar[str] = "policies"

    lora_rank: int = Field(default=0, ge=0, description="LoRA rank; 0 trains all weights of the denoiser")
    lora_alpha: float = Field(default=0.0, ge=0.0, description="LoRA scale numerator; 0 means equal to the rank")
    precision: Precision = Field(
        default="float32",
        description="in which the denoiser computes; trained weights and log-probs are float32 in any",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations twice and keep few: less memory, a third more time in training"
    )
    deterministic: bool = Field(
        default=True, description="on CUDA, only kernels that repeat their numbers; false is faster, and no run repeats"
    )

    def load(self, device: str) -> Policy:
        """The live policy on ``device``, in evaluation mode."""
        raise NotImplementedError

    def ready(self, policy: AnyPolicy) -> AnyPolicy:
        """What ``load`` does last: precision and checkpointing as the settings say."""
        settle(policy.device, self.precision, deterministic=self.deterministic)
        policy.precision = self.precision
        keep_frozen(policy.network, self.precision)
        if self.gradient_checkpointing:
            policy.checkpoint_gradients()
        return policy


class Policy(ABC):
    """A live policy. Families implement the abstract verbs; the rest is shared."""

    path: NoisePath
    prediction: PredictionType
    network: torch.nn.Module
    """The denoiser: what is trained."""
    device: str
    precision: Precision = "float32"
    """In which the network computes; ``denoise`` and ``error`` see to it."""
    critic: torch.nn.Module | None = None
    """A value network that an algorithm trains beside the policy; no part of its weights."""
    snapshots: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({})
    """Name -> earlier trainable weights that a learner keeps ("behaviour", "reference"), for ``as_snapshot``."""
    calls: int = 0
    """Samples that the denoiser was asked about so far; a guided pass asks twice."""
    backward_calls: int = 0
    """Of these, the ones asked with a latent whose gradient is wanted."""
    copies: dict[torch.dtype, Policy] | None = None
    """Copies that compute in another precision, made where one is asked for."""
    interpolation: float = 1.0
    """w in pretrained + w * (own - pretrained), of what ``denoise`` says; 1 is the policy itself."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt; a prompt's rows do not depend on its neighbours in the batch."""

    @abstractmethod
    def predict(
        self,
        x: torch.Tensor,
        timestep_B: torch.Tensor,
        embeds_BLD: torch.Tensor,
        pooled_BD: torch.Tensor | None = None,
    ) -> torch.Tensor:
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

    def merged(self) -> Policy:
        """A policy without adapters, which saves as a whole pipeline; families that can merge a LoRA do so in a copy."""
        from rlalign import lora

        if lora.is_attached(self.network):
            raise UserError(f"a merged export needs a policy that can merge its LoRA, got {type(self).__name__}")
        return self

    def denoise(
        self, x: torch.Tensor, level: torch.Tensor, condition: Condition, guidance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(clean, noise) that the policy sees in ``x``; level is a scalar or (B,).

        With ``interpolation`` other than 1 the pretrained model is asked too (reinforcement learning guidance,
        arXiv:2508.21016). Guidance w is uncond + w * (cond - uncond) on the raw prediction (Ho & Salimans 2022,
        arXiv:2207.12598), one pass of 2B rows; the gradient flows through both halves. w = 1 is one pass of B rows.
        """
        own = self._denoise(x, level, condition, guidance)
        if self.interpolation == 1.0:
            return own
        with self.as_reference(pretrained=True):
            base = self._denoise(x, level, condition, guidance)
        clean, noise = (b + self.interpolation * (o - b) for o, b in zip(own, base, strict=True))
        return clean, noise

    def _denoise(
        self, x: torch.Tensor, level: torch.Tensor, condition: Condition, guidance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.shape[0]
        asked = rows if guidance == 1.0 else 2 * rows
        self.calls += asked
        self.backward_calls += asked if x.requires_grad else 0
        timestep_B = self.path.timestep(level).to(x.device).expand(rows)
        if guidance == 1.0:
            prediction = self._output(x, timestep_B, condition.embeds_BLD, condition.pooled_BD)
        else:
            both, pooled = torch.cat([condition.uncond_BLD, condition.embeds_BLD]), None
            if condition.pooled_BD is not None and condition.uncond_pooled_BD is not None:
                pooled = torch.cat([condition.uncond_pooled_BD, condition.pooled_BD])
            output = self._output(torch.cat([x, x]), torch.cat([timestep_B, timestep_B]), both, pooled)
            uncond, cond = output.chunk(2)
            prediction = uncond + guidance * (cond - uncond)
        alpha, sigma = coefficients(self.path, level, x)
        return to_clean_and_noise(prediction, x, alpha, sigma, self.prediction)

    def _output(
        self, x: torch.Tensor, timestep_B: torch.Tensor, embeds_BLD: torch.Tensor, pooled_BD: torch.Tensor | None
    ) -> torch.Tensor:
        """``predict`` in the policy's precision; what came out in bfloat16 is given back in the latent's."""
        with autocast(self.device, self.precision):
            output = self.predict(x, timestep_B, embeds_BLD, pooled_BD)
        return output.to(x.dtype) if output.dtype == torch.bfloat16 else output

    def checkpoint_gradients(self) -> None:
        """From now on the backward pass computes most activations again instead of keeping them."""
        raise UserError(f"policy.gradient_checkpointing must be false for {type(self).__name__}, which cannot do it")

    def as_latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Clean latents (B, C, H, W) of what may be latents already, or media (B, F, 3, H, W) uint8."""
        return self.encode_media(pictures.float() / 255.0) if pictures.dtype == torch.uint8 else pictures

    def error(
        self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """(B,) squared error of the network's raw output at x = alpha * clean + sigma * noise, averaged over elements.

        In the network's own prediction type: |noise - prediction|^2 for epsilon (Ho 2020), |velocity - prediction|^2 for flow.
        """
        alpha, sigma = coefficients(self.path, level, clean)
        timestep_B = self.path.timestep(level).to(clean.device).expand(len(clean))
        self.calls += len(clean)
        output = self._output(alpha * clean + sigma * noise, timestep_B, condition.embeds_BLD, condition.pooled_BD)
        return ((output - target(clean, noise, alpha, sigma, self.prediction)) ** 2).flatten(1).mean(1)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Name -> parameter of what is trained, in a fixed order."""
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    def replica(self) -> Policy:
        """A second policy on the same weights (updates in place reach both) with gradients of its own: one per thread."""
        twin = copy.copy(self)
        twin.copies = None
        twin.network, twin.critic = copy.deepcopy(self.network), copy.deepcopy(self.critic)
        for own, others in ((self.network, twin.network), (self.critic, twin.critic)):
            if own is not None and others is not None:
                for mine, other in zip(own.parameters(), others.parameters(), strict=True):
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
    def as_reference(self, *, pretrained: bool = False) -> Iterator[None]:
        """Inside, the policy is the pretrained one: the adapter off (LoRA), or a kept copy of the weights swapped in.

        Where a learner refreshes the reference, it is the weights of the last refresh, unless ``pretrained`` is asked for.
        """
        from rlalign import lora

        if "reference" in self.snapshots and not pretrained:
            inside = self.holding(self.snapshots["reference"])
        elif lora.is_attached(self.network):
            inside = lora.disabled(self.network)
        else:
            inside = self.holding(self.reference)
        with inside:
            yield

    @contextlib.contextmanager
    def as_snapshot(self, kind: str) -> Iterator[None]:
        """Inside, the policy has the trainable weights of one of its snapshots."""
        with self.holding(self.snapshots[kind]):
            yield

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, the policy has these trainable weights instead of its own."""
        # pointers move, numbers do not: other replicas on these weights, and graphs built before, stay as they are
        own = self.trainable()
        assert own.keys() == weights.keys(), "this policy keeps no such weights"
        current = {name: parameter.data for name, parameter in own.items()}
        for name, parameter in own.items():
            parameter.data = weights[name]
        try:
            yield
        finally:
            for name, parameter in own.items():
                parameter.data = current[name]

    reference: dict[str, torch.Tensor]
    """The pretrained trainable weights; empty with LoRA, whose reference is the adapter switched off."""
