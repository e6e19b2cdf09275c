"""What a policy is: a denoiser with its path, its words and its pictures, live in one process."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field

from rlalign.core.finite import all_finite, refuse_answer, refuse_weights
from rlalign.core.locations import LocalPath
from rlalign.core.records import Plan, is_guided
from rlalign.core.registry import Before, Recipe, UserError
from rlalign.diffusion.condition import Condition, Words
from rlalign.diffusion.paths import NoisePath, coefficients
from rlalign.diffusion.predictions import PredictionType, target, to_clean_and_noise
from rlalign.networks import lora
from rlalign.networks.precision import Precision, autocast, keep_frozen, settle
from rlalign.policies._sample import sample


def refuse_frames(plan: Plan) -> None:
    """Raises UserError where a plan asks for a clip of a policy that draws pictures."""
    if plan.frames != 1:
        raise UserError(
            f"plan.frames must be 1 for a policy that draws pictures, got {plan.frames}"
        )


AnyPolicy = TypeVar("AnyPolicy", bound="Policy")
OWN_SIZE = Plan()
"""A plan that leaves the size to the policy."""


class PolicyRecipe(Recipe):
    """Base of a model family: settings of the checkpoint and of what is trained in it."""

    shelf: ClassVar[str] = "policies"
    pipeline_classes: ClassVar[tuple[str, ...]] = ()
    """Classes of diffusers' pipelines whose folders this family reads, as model_index.json names
    them."""

    lora_rank: int = Field(
        default=0, ge=0, description="LoRA rank; 0 trains all weights of the denoiser"
    )
    lora_alpha: float = Field(
        default=0.0, ge=0.0, description="LoRA scale numerator; 0 means equal to the rank"
    )
    adapter: Annotated[LocalPath, Before("")] = Field(
        default="", description="LoRA to start from, as diffusers saves it: a folder, or its file"
    )
    precision: Precision = Field(
        default="float32",
        description=(
            "in which the denoiser computes; trained weights and log-probs are float32 in any"
        ),
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description=(
            "compute activations twice and keep few: less memory, a third more time in training"
        ),
    )
    deterministic: bool = Field(
        default=True,
        description=(
            "on CUDA, only kernels that repeat their numbers; false is faster, and no run repeats"
        ),
    )

    @property
    def lora_settings(self) -> dict[str, Any]:
        """What a live policy is told of its LoRA when it is made."""
        return {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha, "adapter": self.adapter}

    @property
    def denoiser_dtype(self) -> torch.dtype:
        """In which the denoiser is read: its precision where only an adapter is trained, else
        float32."""
        rounded = self.precision == "bfloat16" and bool(self.lora_rank or self.adapter)
        return torch.bfloat16 if rounded else torch.float32

    def load(self, device: str) -> Policy:
        """The live policy on ``device``, in evaluation mode."""
        raise NotImplementedError

    def calls_per_look(self, plan: Plan) -> int:
        """Denoiser calls of one sample at one step: two with classifier-free guidance. A family
        whose live policy asks more often says so."""
        return 2 if is_guided(plan.guidance) else 1

    def announce(self) -> None:
        """Says on stderr what a user should know of how the checkpoint is sampled; loads
        nothing."""

    def ready(self, policy: AnyPolicy) -> AnyPolicy:
        """What ``load`` does last: precision and checkpointing as the settings say. Refuses weights
        that are not finite."""
        if self.adapter and not (lora.is_attached(policy.network) and policy.reference):
            raise UserError(
                f"policy.adapter must be empty for {self.name}, which takes none, got"
                f" {self.adapter!r}"
            )
        refuse_weights(policy.parts())
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
    """Name -> earlier trainable weights that a learner keeps ("behaviour", "reference"), for
    ``as_snapshot``."""
    calls: int = 0
    """Samples that the denoiser was asked about so far; a guided pass asks twice."""
    backward_calls: int = 0
    """Of these, the ones asked with a latent whose gradient is wanted."""
    copies: dict[torch.dtype, Policy] | None = None
    """Copies that compute in another precision, made where one is asked for."""
    watch: str = ""
    """Where something was found that is not finite: then every answer of the network is looked at,
    to name the part at fault."""
    interpolation: float = 1.0
    """w in pretrained + w * (own - pretrained), of what ``denoise`` says; 1 is the policy
    itself."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        """The condition of each prompt under a plan; a prompt's rows do not depend on its
        neighbours in the batch."""

    @abstractmethod
    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        """The network's raw output for latents (B, *latent), told the timestep and the family's
        words."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Clean latents (B, *latent) -> media (B, F, 3, H, W) float32 in [0, 1]."""

    @abstractmethod
    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        """Media in [0, 1] -> clean latents: the mean of the encoder's posterior."""

    def posterior(self, media_BFCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and standard deviation, each (B, *latent), of the encoder's posterior over clean
        latents for media in [0, 1]; None in place of the latter where the encoder has none."""
        return self.encode_media(media_BFCHW), None

    @abstractmethod
    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        """Shape of one sample's latent under a plan. Raises UserError for a plan that the policy
        cannot follow."""

    def drawn_size(self, plan: Plan) -> tuple[int, int]:
        """(height, width) in pixels of what is drawn under a plan. A family whose decoder's factors
        say it answers without decoding; here a latent of zeros is decoded."""
        blank = torch.zeros(1, *self.latent_shape(plan), device=self.device)
        with torch.no_grad():
            height, width = self.decode(blank).shape[-2:]
        return height, width

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what plain diffusers loads: a pipeline folder, or a LoRA file."""

    def sample(
        self,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float = 1.0,
        eta: float = 0.0,
        seed: int = 0,
        latents: torch.Tensor | np.ndarray | None = None,
        height: int = 0,
        width: int = 0,
        frames: int = 1,
        output: Literal["media", "latents"] = "media",
    ) -> torch.Tensor:
        """One picture a prompt: media (B, F, 3, H, W) uint8 on the CPU, or final latents (B,
        *latent) float32.

        With ``eta`` 0 it is the pipeline's own deterministic sampler (DDIM; Euler on a flow). The
        chain begins at ``latents`` (B, *latent), or at noise that depends on the seed, the prompt
        and its place in the list alone. Raises UserError for a plan that the policy cannot follow.
        """
        settings = {"steps": steps, "guidance": guidance, "eta": eta}
        settings |= {"height": height, "width": width, "frames": frames}
        return sample(self, prompts, settings, seed=seed, latents=latents, output=output)

    def merged(self) -> Policy:
        """A policy without adapters, which saves as a whole pipeline; families that can merge a
        LoRA do so in a copy."""
        if lora.is_attached(self.network):
            raise UserError(
                f"a merged export needs a policy that can merge its LoRA, got {type(self).__name__}"
            )
        return self

    def denoise(
        self, x: torch.Tensor, level: torch.Tensor, condition: Condition, guidance: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(clean, noise) that the policy sees in ``x``; level is a scalar or (B,).

        With ``interpolation`` other than 1 the pretrained model is asked too (reinforcement
        learning guidance, arXiv:2508.21016). Guidance combines two raw predictions (``combine``)
        of one pass of 2B rows; the gradient flows through both halves. At 1 and below it is one
        pass of B rows for the caption alone, as in diffusers' pipelines.
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
        timestep_B = self.path.timestep(level).to(x.device).expand(len(x))
        prediction = self.guided(x, timestep_B, condition, guidance)
        alpha, sigma = coefficients(self.path, level, x)
        return to_clean_and_noise(prediction, x, alpha, sigma, self.prediction)

    def guided(
        self, x: torch.Tensor, timestep_B: torch.Tensor, condition: Condition, guidance: float
    ) -> torch.Tensor:
        """One look: the raw prediction under classifier-free guidance, which asks as often as the
        recipe's ``calls_per_look`` says."""
        if not is_guided(guidance):
            return self.answer(x, timestep_B, condition.caption)
        both = self.answer(torch.cat([x, x]), torch.cat([timestep_B, timestep_B]), condition.both())
        uncond, cond = both.chunk(2)
        return self.combine(cond, uncond, guidance)

    def combine(self, cond: torch.Tensor, uncond: torch.Tensor, guidance: float) -> torch.Tensor:
        """The guided prediction of the two raw ones (Ho & Salimans 2022, arXiv:2207.12598); a
        family whose pipeline does otherwise says so here."""
        return uncond + guidance * (cond - uncond)

    def answer(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        """``predict`` in the policy's precision; what came out in bfloat16 is given back in the
        latent's. Counts what was asked."""
        self.calls += len(x)
        self.backward_calls += len(x) if x.requires_grad else 0
        with autocast(self.device, self.precision):
            output = self.predict(x, timestep_B, words)
        if self.watch and not all_finite(output):
            refuse_answer(self, x, timestep_B, words)
        return output.to(x.dtype) if output.dtype == torch.bfloat16 else output

    def parts(self) -> Mapping[str, torch.nn.Module]:
        """The networks that it is made of, by the names of their folders or of what they do."""
        return {"denoiser": self.network}

    def checkpoint_gradients(self) -> None:
        """From now on the backward pass computes most activations again instead of keeping them."""
        raise UserError(
            f"policy.gradient_checkpointing must be false for {type(self).__name__}, which cannot"
            " do it"
        )

    def as_latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Clean latents (B, *latent) of what may be latents already, or media (B, F, 3, H, W)
        uint8."""
        return (
            self.encode_media(pictures.float() / 255.0)
            if pictures.dtype == torch.uint8
            else pictures
        )

    def error(
        self, clean: torch.Tensor, noise: torch.Tensor, level: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """(B,) squared error of the network's raw output at x = alpha * clean + sigma * noise,
        averaged over elements.

        In the network's own prediction type: |noise - prediction|^2 for epsilon (Ho 2020),
        |velocity - prediction|^2 for flow.
        """
        alpha, sigma = coefficients(self.path, level, clean)
        timestep_B = self.path.timestep(level).to(clean.device).expand(len(clean))
        output = self.answer(alpha * clean + sigma * noise, timestep_B, condition.caption)
        return (
            ((output - target(clean, noise, alpha, sigma, self.prediction)) ** 2).flatten(1).mean(1)
        )

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Name -> parameter of what is trained, in a fixed order."""
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    def replica(self) -> Policy:
        """A second policy on the same weights (updates in place reach both) with gradients of its
        own: one per thread."""
        twin = copy.copy(self)
        twin.copies = None
        twin.network = copy.deepcopy(self.network)
        twin.critic = copy.deepcopy(self.critic)
        for name, part in vars(self).items():
            if isinstance(part, torch.nn.Module) and self.keeps_state(part):
                setattr(twin, name, copy.deepcopy(part))
        for own, others in ((self.network, twin.network), (self.critic, twin.critic)):
            if own is not None and others is not None:
                for mine, other in zip(own.parameters(), others.parameters(), strict=True):
                    other.data = mine.data
        return twin

    def keeps_state(self, part: torch.nn.Module) -> bool:
        """Whether a frozen part writes on itself while it computes, so that each thread needs its
        own: causal video autoencoders do, which keep the features of the frames before."""
        return hasattr(part, "clear_cache")

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the trainable weights: what a rollout worker needs to become this version."""
        return {n: p.detach().clone() for n, p in self.trainable().items()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Takes over trainable weights; names and shapes must match."""
        own = self.trainable()
        assert own.keys() == weights.keys(), (
            f"weights differ in {sorted(own.keys() ^ weights.keys())[:3]}"
        )
        for name, parameter in own.items():
            parameter.copy_(weights[name])

    @contextlib.contextmanager
    def as_reference(self, *, pretrained: bool = False) -> Iterator[None]:
        """Inside, the policy is the one that training began with: the adapter off (a new LoRA), or
        kept weights swapped in.

        Where a learner refreshes the reference, it is the weights of the last refresh, unless
        ``pretrained`` is asked for.
        """
        if "reference" in self.snapshots and not pretrained:
            inside = self.holding(self.snapshots["reference"])
        elif lora.is_attached(self.network) and not self.reference:
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
        # pointers move, numbers do not: other replicas on these weights, and graphs built before,
        # stay as they are
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
    """The trainable weights that training began with; empty for a new LoRA, whose reference is the
    adapter switched off."""
