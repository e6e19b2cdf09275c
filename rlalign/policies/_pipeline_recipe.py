"""The settings of families of diffusers' pipelines: which checkpoint, and which parts of it a
process loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from rlalign.core.finite import refuse_weights
from rlalign.core.locations import LocalPathOrHubId
from rlalign.core.registry import Before, UserError
from rlalign.networks import compilation, sharding
from rlalign.networks.embeddings import EmbeddingsFile, Reader
from rlalign.networks.pipelines.absent import is_absent
from rlalign.networks.pipelines.checkpoints import load_checkpoint
from rlalign.networks.pipelines.files import check_files
from rlalign.networks.pipelines.schedulers import say_steps
from rlalign.networks.precision import keep_frozen, settle
from rlalign.policies._family import WHOLE, Family, Part
from rlalign.policies._policy import Policy
from rlalign.policies._recipe import PolicyRecipe
from rlalign.policies._words import ACTOR, Embeddings

NegativePrompt = Annotated[
    str,
    Before(""),
    Field(description="what plan.guidance goes away from, as a call's negative_prompt"),
]


class PipelineRecipe(PolicyRecipe):
    """Base of the settings of a family whose checkpoints are diffusers' pipelines."""

    family: ClassVar[Any]  # a class derived from PipelineFamily
    beside_words: ClassVar[tuple[str, ...]] = ()
    """Settings of a family's own that leave its words as they are."""

    path: LocalPathOrHubId = Field(
        description="pipeline folder, its weights in one .safetensors file, or hub id"
    )
    negative_prompt: NegativePrompt = ""
    embeddings: Embeddings = ""
    decode_rows: Annotated[int, Before(0)] = Field(
        default=0, ge=0, description="pictures decoded at once, for less memory; 0 is a unit's all"
    )
    vae_tiling: Annotated[bool, Before(False)] = Field(
        default=False,
        description="decode in tiles that blend (diffusers): less memory, and other pixels",
    )
    compile: Annotated[bool, Before(False)] = Field(
        default=False,
        description="the denoiser's blocks through torch.compile: for GPUs; other last bits",
    )
    channels_last: Annotated[bool, Before(False)] = Field(
        default=False,
        description="convolutions of a UNet and of the autoencoder with channels last in memory",
    )

    @property
    def location(self) -> str:
        """What ``path`` means."""
        return self.path

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Part -> in which it is read, where that is not float32."""
        return {self.family.part: self.denoiser_dtype}

    @property
    def encodes_in_actor(self) -> bool:
        return self.embeddings == ACTOR

    @property
    def word_settings(self) -> Mapping[str, str]:
        """Settings that its words depend on, by dotted path, as JSON."""
        shared = {*PipelineRecipe.model_fields, *self.beside_words}
        own = self.model_dump(mode="json", exclude=shared)
        return {f"policy.{name}": json.dumps(value) for name, value in own.items()}

    def build(self, device: str) -> Any:
        """A PipelineFamily; loads safetensors weights alone."""
        return self.build_parts(device, WHOLE)

    def build_parts(self, device: str, parts: frozenset[Part], reader: Reader | None = None) -> Any:
        return self._around(self._read(parts, reader), device, parts, reader)

    def make_policy(self, family: Family) -> Policy:
        policy = super().make_policy(family)
        self._speed_up(policy)
        return policy

    def _speed_up(self, policy: Policy) -> None:
        """What makes the same weights faster once the parts are known to fit."""
        family: Any = policy.family
        if self.channels_last:
            # a transformer has no convolution but that of its patches
            networks = list(family.denoisers.values()) if family.part == "unet" else []
            for network in [*networks, *([family.vae] if family.has("vae") else [])]:
                compilation.use_channels_last(network)
        if self.compile:
            compilation.try_compiler(family.device)
            for network in family.denoisers.values():
                compilation.compile_blocks(network)

    def load_spread(
        self, device: str, parts: frozenset[Part], reader: Reader | None, *, trained: bool
    ) -> Policy:
        if self.compile:
            raise UserError(
                "policy.compile must be false where the denoiser is spread over processes"
                " (learner.shard, runtime.rollout.shard), got true"
            )

        # one process reads the denoiser, in the precision in which its frozen weights are kept
        adapts = bool(self.lora_rank or self.adapter)

        def read() -> Any:
            held = parts if sharding.reads() else parts - {"denoiser"}
            pipeline = self._read(held, reader)
            for name, network in pipeline.components.items():
                if isinstance(network, torch.nn.Module) and not is_absent(network):
                    refuse_weights({name: network})
                    if self.family.role_of(name) == "denoiser" and (adapts or not trained):
                        network.requires_grad_(False)
                        if adapts:
                            keep_frozen(network, self.precision)
            return pipeline

        pipeline = sharding.load_together(read)
        denoisers = [n for n in pipeline.components if self.family.role_of(n) == "denoiser"]
        networks = [n for n in denoisers if getattr(pipeline, n, None) is not None]

        # adapters are added to stand-ins, which then get what was read
        wholes = sharding.put_stand_ins(pipeline, networks, device)
        family = self._around(pipeline, device, parts, reader)
        settle(device, self.precision, deterministic=self.deterministic)
        policy = self.assemble(family) if adapts else None if trained else self._freeze(family)
        for part, network in family.denoisers.items():
            sharding.spread(network, wholes.pop(part, None), device)
        # what is trained is kept as the reference too: in shares, once it is spread
        policy = policy or self.assemble(family)
        family.try_out(self.precision)
        return policy

    def _freeze(self, family: Any) -> Policy:
        """The policy around a family of which nothing is trained: its weights stay as they are in
        one that is trained whole."""
        family.network.requires_grad_(False)
        return Policy(family, precision=self.precision, reference={})

    def _read(self, parts: frozenset[Part], reader: Reader | None) -> Any:
        """The pipeline with the weights of ``parts``; text encoders are held where the words come
        from nowhere else."""
        family = self.family
        place = self.location
        self._check_files()
        held = parts - {"words"} if reader or self._reads_file(parts) else parts
        pipeline = load_checkpoint(
            place,
            family.readable_classes(),
            self.dtypes,
            lambda part: family.role_of(part) in held,
            **family.pipeline_settings,
        )
        family.check(pipeline, place)
        say_steps(place, Path(pipeline.config["_name_or_path"]))
        return pipeline

    def _around(
        self, pipeline: Any, device: str, parts: frozenset[Part], reader: Reader | None
    ) -> Any:
        """The family around a pipeline, and where its words come from instead."""
        found = self.family(self, pipeline, device)
        if reader is None and self._reads_file(parts):
            reader = EmbeddingsFile(Path(self.embeddings), found.makers_of_words())
        found.reader = reader
        return found

    def _reads_file(self, parts: frozenset[Part]) -> bool:
        """Whether the words come from a file of embeddings."""
        return self.embeddings not in ("", ACTOR) and "words" in parts

    def load_encoder(self, device: str) -> Any:
        """The family with its text encoders alone, for a process that encodes for others, as
        ``load`` would have them."""
        alone = self.model_copy(update={"embeddings": ""})
        found = alone.build_parts(device, frozenset({"words"}))
        refuse_weights(found.parts())
        settle(device, self.precision, deterministic=self.deterministic)
        return found

    def announce(self) -> None:
        self._check_files()
        say_steps(self.location)

    def _check_files(self) -> None:
        """Refuses a folder whose files are damaged, or are not there."""
        family = self.family
        unread = family.pipeline_settings
        check_files(self.location, family.readable_classes(), family.part, unread)
