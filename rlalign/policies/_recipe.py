"""What a policy's settings are, and how a live policy is made of them."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from rlalign.core.finite import refuse_weights
from rlalign.core.locations import LocalPath
from rlalign.core.records import Plan
from rlalign.core.registry import Before, Recipe, UserError
from rlalign.networks import sharding
from rlalign.networks.embeddings import Reader
from rlalign.networks.precision import Precision, keep_frozen, settle
from rlalign.policies._family import WHOLE, Family, Part
from rlalign.policies._policy import Policy


class PolicyRecipe(Recipe):
    """Base of a model family's settings: the checkpoint, and what is trained in it."""

    shelf: ClassVar[str] = "policies"
    family: ClassVar[type[Family]] = Family
    """What ``build`` gives: its class says, before anything is loaded, what it reads and what a
    look costs."""
    by_folder: ClassVar[bool] = True
    """Whether a pipeline folder that is named alone is read under this name."""

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

    def build(self, device: str) -> Family:
        """The family with its checkpoint on ``device``, in evaluation mode. Raises UserError for a
        missing, damaged or unknown one."""
        raise NotImplementedError

    def build_parts(
        self, device: str, parts: frozenset[Part], reader: Reader | None = None
    ) -> Family:
        """The same with ``parts`` of the checkpoint alone, where the family can leave out others;
        ``reader`` gives the words of prompts in place of text encoders."""
        return self.build(device)

    def refuse_spread(self, setting: str, processes: int, *, trained: bool) -> None:
        """Raises UserError, naming a setting that is to be 1, where its denoiser cannot be spread
        over so many processes that sample. ``trained`` says whether weights of a training are put
        into it."""
        if processes == 1:
            return
        if trained and not (self.lora_rank or self.adapter):
            raise UserError(
                f"{setting} must be 1 where all weights are trained, got {processes}: what is"
                " spread is a frozen denoiser; set policy.lora_rank or policy.adapter"
            )
        if not self.family.can_spread:
            raise UserError(
                f"{setting} must be 1 for policy {self.name}, whose denoiser is no row of"
                f" transformer blocks, got {processes}"
            )

    @property
    def encodes_in_actor(self) -> bool:
        """Whether one process of a run encodes prompts for all others."""
        return False

    def load_encoder(self, device: str) -> Family:
        """The family of a process that encodes for others; where ``encodes_in_actor``."""
        raise NotImplementedError

    def load(
        self,
        device: str,
        parts: frozenset[Part] = WHOLE,
        reader: Reader | None = None,
        *,
        spread: bool = False,
        trained: bool = True,
    ) -> Policy:
        """The live policy on ``device``: the family, with its adapter, in its precision. ``parts``
        and ``reader`` are as in ``build_parts``; with ``spread`` the denoiser is spread over the
        processes of torch's group, which all have to ask: one that is ``trained`` too."""
        if self.adapter and not self.family.reads_adapters:
            raise UserError(
                f"policy.adapter must be empty for {self.name}, which takes none, got"
                f" {self.adapter!r}"
            )
        if spread and sharding.processes() > 1:
            return self.load_spread(device, parts, reader, trained=trained)
        return self.make_policy(self.build_parts(device, parts, reader))

    def load_spread(
        self, device: str, parts: frozenset[Part], reader: Reader | None, *, trained: bool
    ) -> Policy:
        """The policy whose denoiser is spread over processes; where the family ``can_spread``. Not
        ``trained``, without an adapter, its weights are frozen."""
        raise NotImplementedError

    def make_policy(self, family: Family) -> Policy:
        """The policy around a family that is loaded. Raises UserError for weights that are not
        finite, and for parts that do not fit."""
        refuse_weights(family.parts())
        settle(family.device, self.precision, deterministic=self.deterministic)
        policy = self.assemble(family)
        family.try_out(self.precision)
        return policy

    def assemble(self, family: Family) -> Policy:
        """The policy around a family, of which nothing is tried out: with its adapter, in its
        precision. Raises UserError for an adapter that the family does not take."""
        # what is trained
        network = family.network
        rank = self.lora_rank
        alpha = self.lora_alpha
        if self.adapter:
            family.attach_saved(self.adapter, rank=rank, alpha=alpha)
        elif rank and not family.lora_targets:
            raise UserError(
                f"policy.lora_rank must be 0 for {self.name}, which takes no adapter, got {rank}"
            )
        elif rank:
            family.attach(rank=rank, alpha=alpha)

        # how it computes
        policy = Policy(family, precision=self.precision)
        if self.adapter:
            policy.reference = policy.weights()
        keep_frozen(network, self.precision)
        if self.gradient_checkpointing:
            family.checkpoint_gradients()
        return policy

    @property
    def denoiser_dtype(self) -> torch.dtype:
        """In which the denoiser is read: its precision where only an adapter is trained, else
        float32."""
        rounded = self.precision == "bfloat16" and bool(self.lora_rank or self.adapter)
        return torch.bfloat16 if rounded else torch.float32

    def calls_per_look(self, plan: Plan) -> int:
        """Denoiser calls of one sample at one step; a family whose settings change that says so."""
        return self.family.calls_per_look(plan)

    def announce(self) -> None:
        """Says on stderr what a user should know of how the checkpoint is sampled; loads nothing.
        Raises UserError for a checkpoint that is seen to be damaged."""
