"""What a model family says: how prompts become words, what the denoiser answers, how latents become
media and back."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch

from rlalign.core.records import Plan, is_guided
from rlalign.core.registry import UserError
from rlalign.diffusion.condition import Condition, Words
from rlalign.diffusion.paths import NoisePath
from rlalign.diffusion.predictions import PredictionType
from rlalign.networks import lora
from rlalign.networks.precision import Precision

OWN_SIZE = Plan()
"""A plan that leaves the size to the policy."""
Part = Literal["denoiser", "vae", "words"]
"""What a process may need of a checkpoint: its denoiser, its autoencoder, its text encoders."""
WHOLE: frozenset[Part] = frozenset({"denoiser", "vae", "words"})
LATENTS: frozenset[Part] = frozenset({"denoiser", "words"})
"""What a process needs that sees latents alone, and no pictures."""

Ask = Callable[[torch.Tensor, torch.Tensor, Words], torch.Tensor]
"""(latents, timestep_B, words) -> the raw prediction, counted: ``predict`` in a precision."""


def refuse_frames(plan: Plan) -> None:
    """Raises UserError where a plan asks for a clip of a policy that draws pictures."""
    if plan.frames != 1:
        raise UserError(
            f"plan.frames must be 1 for a policy that draws pictures, got {plan.frames}"
        )


class Family(ABC):
    """A checkpoint of one model family on one device: five verbs, and what it declares.

    It holds networks and numbers, and no verb changes them; what changes while a policy computes
    (weights that are swapped, counts, precision) belongs to the ``Policy`` around it.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ()
    """Classes of diffusers' pipelines whose folders this family reads, as model_index.json names
    them."""
    classes_by_name: ClassVar[tuple[str, ...]] = ()
    """Further ones, which another family reads, that this one reads where its policy is named."""
    lora_targets: Sequence[str] = ()
    """Endings of the names of layers that a LoRA adapts; none where it takes no adapter."""
    trial_prompt: str = ""
    """A prompt to try the family with; not the empty one where a prompt must have a record."""
    reads_adapters: ClassVar[bool] = False
    """Whether training may start from a LoRA file (``attach_saved``)."""
    reads_embeddings: ClassVar[bool] = True
    """Whether its words may come from a file of ``rlalign encode``."""
    can_spread: ClassVar[bool] = False
    """Whether its denoiser can be spread over processes, a block after the other."""
    own_per_thread: tuple[str, ...] = ()
    """Attributes with frozen parts that write on themselves while they compute, as causal video
    autoencoders do, which keep the features of the frames before: each thread has a copy."""

    path: NoisePath
    prediction: PredictionType
    network: torch.nn.Module
    """The denoiser: what is trained."""
    device: str

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

    def first_frames(self, latents: torch.Tensor, frames: int) -> torch.Tensor:
        """The part of clean latents that tells at most the first ``frames`` of a clip; a picture's
        latents whole."""
        return latents

    @abstractmethod
    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        """Media in [0, 1] -> clean latents: the mean of the encoder's posterior."""

    def posterior(self, media_BFCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and standard deviation, each (B, *latent), of the encoder's posterior over clean
        latents for media in [0, 1]; None in place of the latter where the encoder has none."""
        return self.encode_media(media_BFCHW), None

    @abstractmethod
    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        """Shape of one sample's latent under a plan. Raises UserError for a plan that the family
        cannot follow."""

    def drawn_size(self, plan: Plan) -> tuple[int, int]:
        """(height, width) in pixels of what is drawn under a plan. A family whose decoder's factors
        say it answers without decoding; here a latent of zeros is decoded."""
        blank = torch.zeros(1, *self.latent_shape(plan), device=self.device)
        with torch.no_grad():
            height, width = self.decode(blank).shape[-2:]
        return height, width

    def tell_crops(self, words: Words, crops_B4: torch.Tensor, size: tuple[int, int]) -> Words:
        """The words of B pictures of ``size`` (height, width) that were cut out of others: what
        these measured (height, width) and where (top, left) they were cut once resized. Here the
        denoiser is told nothing of it."""
        return words

    # --- guidance ---------------------------------------------------------------------------------

    @classmethod
    def calls_per_look(cls, plan: Plan) -> int:
        """Denoiser calls of one sample at one step, as often as ``look`` asks: two with
        classifier-free guidance."""
        return 2 if is_guided(plan.guidance) else 1

    def look(
        self,
        ask: Ask,
        x: torch.Tensor,
        timestep_B: torch.Tensor,
        condition: Condition,
        guidance: float,
    ) -> torch.Tensor:
        """The raw prediction under classifier-free guidance: one pass of 2B rows, or of B for the
        caption alone at a guidance of 1 and below, as in diffusers' pipelines. Where the condition
        says ``detach_uncond``, the numbers are the same and gradients flow through the caption's
        half only."""
        if not is_guided(guidance):
            return ask(x, timestep_B, condition.caption)
        both = ask(torch.cat([x, x]), torch.cat([timestep_B, timestep_B]), condition.both())
        uncond, cond = both.chunk(2)
        if condition.detach_uncond:
            uncond = uncond.detach()
        return self.combine(cond, uncond, self.guidance_at(timestep_B, guidance))

    def guidance_at(self, timestep_B: torch.Tensor, guidance: float) -> Any:
        """How much guidance each row of a guided look has: the plan's, or numbers (B, 1, ...) of a
        family whose guidance follows the timestep."""
        return guidance

    def measure(self, timestep_B: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Metric -> (B,) of rows that are learned from; the learner has their means. Here
        nothing."""
        return {}

    def combine(self, cond: torch.Tensor, uncond: torch.Tensor, guidance: float) -> torch.Tensor:
        """The guided prediction of the two raw ones (Ho & Salimans 2022, arXiv:2207.12598); a
        family whose pipeline does otherwise says so here."""
        return uncond + guidance * (cond - uncond)

    # --- the networks -----------------------------------------------------------------------------

    def parts(self) -> Mapping[str, torch.nn.Module]:
        """The networks that it is made of, by the names of their folders or of what they do."""
        return {"denoiser": self.network}

    @classmethod
    def role_of(cls, part: str) -> Part:
        """What one of ``parts`` is for; a family that cannot leave out any says that all are its
        denoiser."""
        return "denoiser"

    def with_network(self, network: torch.nn.Module) -> Self:
        """The same family around another denoiser; other parts are shared."""
        twin = copy.copy(self)
        twin.network = network
        return twin

    def for_thread(self, network: torch.nn.Module) -> Self:
        """The family for another thread: around its own denoiser, with parts that keep state
        copied."""
        twin = self.with_network(network)
        for name in self.own_per_thread:
            setattr(twin, name, copy.deepcopy(getattr(self, name)))
        return twin

    def attach(self, *, rank: int, alpha: float) -> None:
        """Freezes the denoiser and adds a new trainable LoRA."""
        lora.attach(self.network, rank=rank, alpha=alpha, targets=self.lora_targets)

    def attach_saved(self, name: str, *, rank: int, alpha: float) -> None:
        """Freezes the denoiser and adds the trainable LoRA of a file; where ``reads_adapters``."""
        raise NotImplementedError

    def checkpoint_gradients(self) -> None:
        """From now on the backward pass computes most activations again instead of keeping them."""
        raise UserError(
            f"policy.gradient_checkpointing must be false for {type(self).__name__}, which cannot"
            " do it"
        )

    def try_out(self, precision: Precision) -> None:  # noqa: B027 - few families have parts to try
        """Raises UserError where the parts do not fit, by one small pass; here nothing is tried."""

    # --- files ------------------------------------------------------------------------------------

    @classmethod
    def readable_classes(cls) -> tuple[str, ...]:
        """Every class of pipelines whose folders this family reads."""
        return (*cls.pipeline_classes, *cls.classes_by_name)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what plain diffusers loads: a pipeline folder, or a LoRA file."""

    def save_with(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Writes a pipeline folder with these trained weights, whole, in place of its own; where
        the family ``can_spread``."""
        raise NotImplementedError

    def save_merged(self, folder: Path) -> None:
        """Writes what ``merged`` saves; families of large networks do it weight by weight."""
        self.merged().save(folder)

    def save_comfyui(self, file: Path) -> None:
        """Writes the LoRA in one file that ComfyUI reads; families that have keys for it do so.
        Raises UserError for others, and where all weights are trained."""
        raise UserError(
            "--format comfyui must be left out for a policy of whose LoRA diffusers and ComfyUI"
            f" share no keys, as {type(self).__name__}; export a folder"
        )

    def merged(self) -> Self:
        """A copy without adapters, which saves as a whole pipeline; families that can merge a LoRA
        do so."""
        if lora.is_attached(self.network):
            raise UserError(
                f"a merged export needs a policy that can merge its LoRA, got {type(self).__name__}"
            )
        return self
