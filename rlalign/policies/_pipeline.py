"""What the families of diffusers' pipelines share: a folder read part by part, prompts read once,
latents of an autoencoder, a LoRA in diffusers' format."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch

from rlalign.core.finite import refuse, refuse_pixels
from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.diffusion.condition import Condition, Words
from rlalign.diffusion.paths import NoisePath, Tokens
from rlalign.diffusion.predictions import PredictionType
from rlalign.networks import comfyui, lora, merging
from rlalign.networks.embeddings import Reader
from rlalign.networks.pipelines.absent import is_absent
from rlalign.networks.pipelines.checkpoints import load_checkpoint
from rlalign.networks.pipelines.fitting import check_parts, default_size, try_out
from rlalign.networks.pipelines.loading import empty_copy
from rlalign.networks.pipelines.schedulers import read_flow
from rlalign.networks.precision import Precision
from rlalign.policies._family import OWN_SIZE, Family, Part, refuse_frames
from rlalign.policies._pipeline_recipe import PipelineRecipe
from rlalign.policies._words import PromptMemory, makers_of_words

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Endings of the names of an attention's layers."""
JOINT_TARGETS = (*ATTENTION_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The same of an attention that joins the words and the picture."""


class PipelineFamily(Family):
    """A diffusers pipeline as a family. One of its own says which classes it reads, ``read`` and
    ``predict``; and where it is not a flow of square patches of pictures, what else differs."""

    part: ClassVar[str] = "transformer"
    """What the pipeline calls its denoiser."""
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    """Part that must be there -> the classes that it may be of; none is any."""
    pipeline_settings: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """What diffusers is told when it makes the pipeline."""
    own_side: ClassVar[int] = 0
    """Latents of a side that the pipeline draws by itself, where no config says that."""
    even_levels: ClassVar[bool] = False
    """Whether the pipeline hands its flow scheduler even levels of its own, as FLUX's does."""
    draws_clips: ClassVar[bool] = False
    """Whether latents are (C, F, H, W)."""
    trial_timesteps: ClassVar[tuple[int, ...]] = (1,)
    """At which a checkpoint is tried out."""
    reads_adapters: ClassVar[bool] = True
    can_spread: ClassVar[bool] = True
    comfyui_keys: ClassVar[comfyui.Keys | None] = None
    """Under which keys ComfyUI reads a LoRA of this family, where diffusers reads them too."""

    network: Any
    """diffusers' denoiser."""
    in_turn: bool = False
    """Whether each process that shares the denoisers asks what it needs (``Lockstep``)."""
    reader: Reader | None = None
    """Gives the words of a text in place of text encoders in this process."""

    def __init__(self, recipe: PipelineRecipe, pipeline: Any, device: str) -> None:
        self.recipe = recipe
        self.pipeline = pipeline
        self.device = device
        for name, module in self.parts().items():
            module.to(device).eval().requires_grad_(name == self.part)
        self.network = self.denoiser_of(pipeline)
        self.vae = pipeline.vae
        if recipe.vae_tiling:
            self.vae.enable_tiling()
        self.own_per_thread = ("vae",) if hasattr(self.vae, "clear_cache") else ()
        self.path, self.prediction = self.read_path()
        self.memory = PromptMemory()

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        """Refuses, by name, what the family would misread."""
        check_parts(pipeline, path, cls.needs)

    @classmethod
    def role_of(cls, part: str) -> Part:
        """What a component of the pipeline is for; what is neither denoiser nor autoencoder reads
        words."""
        return {cls.part: "denoiser", "vae": "vae"}.get(part, "words")  # type: ignore[return-value]

    def parts(self) -> Mapping[str, torch.nn.Module]:
        components = self.pipeline.components.items()
        networks = {name: part for name, part in components if isinstance(part, torch.nn.Module)}
        if self.device == "meta":  # a policy to count with, of which nothing has weights
            return networks
        return {name: network for name, network in networks.items() if not is_absent(network)}

    def has(self, role: Part) -> bool:
        """Whether a part's weights are in this process."""
        return any(self.role_of(name) == role for name in self.parts())

    def denoiser_of(self, pipeline: Any) -> Any:
        """The denoiser of a pipeline: one of its parts, or several as one."""
        return getattr(pipeline, self.part)

    @property
    def denoisers(self) -> Mapping[str, Any]:
        """The pipeline's parts that the denoiser is made of."""
        return {self.part: self.network}

    @property
    def folder(self) -> str:
        """Where the pipeline was read from, for messages."""
        return str(self.pipeline.config.get("_name_or_path", ""))

    def read_path(self) -> tuple[NoisePath, PredictionType]:
        """The noise path of the pipeline's scheduler, and what the denoiser predicts: a flow's
        velocity."""
        scheduler = self.pipeline.scheduler
        own = self.own_size() if scheduler.config.get("use_dynamic_shifting") else None
        height, width = own or (0, 0)
        tokens = Tokens(side=self.factor * self.patch, height=height, width=width)
        return read_flow(scheduler, self.folder, tokens, even=self.even_levels), "flow"

    # --- words ------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        """What the denoiser is told of one text: named tensors of one row, of the same shapes for
        every text."""

    def words(self, texts: Sequence[str]) -> Words:
        """What the denoiser is told of each text."""
        return self.memory.words(texts, self.read if self.reader is None else self._read_elsewhere)

    def _read_elsewhere(self, text: str) -> Mapping[str, torch.Tensor]:
        assert self.reader is not None
        return {name: tensor.to(self.device) for name, tensor in self.reader(text).items()}

    def makers_of_words(self) -> Mapping[str, str]:
        """What its words are made by, by name: settings as JSON, and digests of text encoders; ""
        for weights that are not on this machine."""
        components = self.pipeline.components.items()
        names = [n for n, one in components if one is not None and self.role_of(n) == "words"]
        parts = [name for name in names if name != "scheduler"]
        recipe = self.recipe
        return makers_of_words(self.pipeline, recipe.location, parts, recipe.word_settings)

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        caption = self.words(prompts)
        empty = self.words([""] * len(prompts))
        return Condition(caption=caption, empty=empty, against=self.against(caption))

    def against(self, caption: Words) -> Words | None:
        """What guidance goes away from, a row for each caption; None is the empty caption."""
        negative = self.recipe.negative_prompt
        rows = len(next(iter(caption.tensors.values())))
        return self.words([negative] * rows) if negative else None

    # --- latents and media ------------------------------------------------------------------------

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self._refuse_no_autoencoder()
        parts = latents.split(self.recipe.decode_rows or max(len(latents), 1))
        media = [self._decode(part) for part in parts]
        return media[0] if len(media) == 1 else torch.cat(media)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = self.to_autoencoder(latents)
        still = self._reads_clips and not self.draws_clips
        pixels = self.run_decoder(scaled.unsqueeze(2) if still else scaled)
        refuse_pixels(pixels, latents)
        media = (pixels / 2 + 0.5).clamp(0, 1)
        return media.transpose(1, 2) if self._reads_clips else media.unsqueeze(1)

    def run_decoder(self, scaled: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1], as the autoencoder lays them out, of latents in its own scale."""
        return self.vae.decode(scaled, return_dict=False)[0]

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        """The posterior's mode, or the latents of an encoder that has no posterior."""
        return self.from_autoencoder(self._encoded(media_BFCHW)[0])

    def posterior(self, media_BFCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        latents, deviation = self._encoded(media_BFCHW)
        if deviation is not None:
            _, std, scaling, _ = self._scales(latents)
            deviation = deviation * scaling if std is None else deviation * scaling / std
        return self.from_autoencoder(latents), deviation

    def _encoded(self, media_BFCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mode and deviation of the encoder's posterior, in its own scale; of an encoder that has
        none its latents, and None."""
        self._refuse_no_autoencoder()
        media = media_BFCHW.transpose(1, 2) if self._reads_clips else media_BFCHW[:, 0]
        encoded = self.vae.encode(media * 2 - 1)
        drawn = getattr(encoded, "latent_dist", None)
        found = [encoded[0]] if drawn is None else [drawn.mode(), drawn.std]
        for tensor in found:
            refuse(tensor, "the policy's autoencoder (its encoder)")
        still = self._reads_clips and not self.draws_clips
        latents, *rest = (tensor[:, :, 0] if still else tensor for tensor in found)
        return latents, rest[0] if rest else None

    def _refuse_no_autoencoder(self) -> None:
        if not self.has("vae"):
            raise UserError(
                "the policy's autoencoder is not in this process: an algorithm whose loss decodes"
                " latents or encodes pictures must say so with sees_media = True"
            )

    @property
    def _reads_clips(self) -> bool:
        """Whether the autoencoder wants (B, C, F, H, W), as those with a cache of frames do."""
        return self.draws_clips or bool(self.own_per_thread)

    def to_autoencoder(self, latents: torch.Tensor) -> torch.Tensor:
        """The denoiser's latents in the autoencoder's own scale."""
        mean, std, scaling, shift = self._scales(latents)
        if std is not None:
            return latents * std / scaling + mean
        return latents / scaling if shift is None else latents / scaling + shift

    def from_autoencoder(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of ``to_autoencoder``."""
        mean, std, scaling, shift = self._scales(latents)
        if std is not None:
            return (latents - mean) * scaling / std
        return latents * scaling if shift is None else (latents - shift) * scaling

    def _scales(self, latents: torch.Tensor) -> tuple[Any, Any, float, float | None]:
        """Mean and deviation of each latent channel, where the autoencoder's config has them; its
        scaling factor; its shift, where it has one."""
        config = self.vae.config
        scaling = config.get("scaling_factor", 1.0)
        mean = config.get("latents_mean")
        std = config.get("latents_std")
        if mean is None or std is None:
            return None, None, scaling, config.get("shift_factor")
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (torch.tensor(v).to(latents).reshape(shape) for v in (mean, std))
        return mean, std, scaling, None

    # --- sizes ------------------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """Pixels of a latent's side."""
        return self.pipeline.vae_scale_factor

    @property
    def patch(self) -> int:
        """Latents of a token's side: sizes are whole tokens."""
        return self.network.config.get("patch_size") or 1

    @property
    def trial_side(self) -> int:
        """Latents of a side, of the pass that a checkpoint is tried out with."""
        return self.patch

    @property
    def trial_frames(self) -> int:
        """Frames of that pass."""
        return 1

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.network.config.in_channels

    def own_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that the checkpoint draws by itself, where it says so."""
        said = self.network.config.get("sample_size") or self.own_side or None
        own = default_size(said, self.folder)
        return None if own is None else (own[0] * self.factor, own[1] * self.factor)

    def drawn_size(self, plan: Plan) -> tuple[int, int]:
        self.latent_shape(plan)  # refuses what the decoder would round
        return self._pixels(plan)

    def _pixels(self, plan: Plan) -> tuple[int, int]:
        """(height, width) of what is drawn: the plan's, or else the checkpoint's own."""
        if plan.height and plan.width:
            return plan.height, plan.width
        own = self.own_size()
        if own is None:
            raise UserError(
                f"plan.height and plan.width must be given for {self.folder!r}, whose"
                f" {self.part}/config.json says no sample_size, got {plan.height} x {plan.width}"
            )
        return plan.height or own[0], plan.width or own[1]

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        refuse_frames(plan)

        # whole tokens
        height, width = self._pixels(plan)
        unit = self.factor * self.patch
        given = plan.height and plan.width
        source = f" (sample_size in {self.part}/config.json stands in for 0)"
        shown = f"{height} x {width}{'' if given else source}"
        if height % unit or width % unit:
            raise UserError(f"plan.height and plan.width must be multiples of {unit}, got {shown}")

        # a transformer may have positions up to a largest size
        largest = (self.network.config.get("pos_embed_max_size") or 0) * unit
        if largest and max(height, width) > largest:
            raise UserError(
                f"plan.height and plan.width must be at most {largest}, where the {self.part}'s"
                f" pos_embed_max_size ends, got {shown}"
            )
        return (self.channels, height // self.factor, width // self.factor)

    # --- the networks -----------------------------------------------------------------------------

    def checkpoint_gradients(self) -> None:
        for network in self.denoisers.values():
            network.enable_gradient_checkpointing()

    def attach_saved(self, name: str, *, rank: int, alpha: float) -> None:
        lora.attach_saved(self.pipeline, self.part, name, rank=rank, alpha=alpha)

    def try_out(self, precision: Precision) -> None:
        if not self.has("denoiser") or not (self.reader or self.has("words")):
            return
        side = self.trial_side * self.factor
        plan = Plan(height=side, width=side, frames=self.trial_frames)
        try_out(self, self.recipe.location, plan, precision)

    # --- files ------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """A pipeline folder (all weights), or ``pytorch_lora_weights.safetensors`` that
        load_lora_weights reads, of each part with an adapter."""
        adapted = [part for part, one in self.denoisers.items() if lora.is_attached(one)]
        for part in adapted:
            lora.save(self.pipeline, part, folder)
        if not adapted:
            merging.save_pipeline(self._whole_pipeline(), folder, {})

    def save_with(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        reads = merging.trained_readers(self.network, self.denoisers, weights)
        merging.save_pipeline(self._whole_pipeline(), folder, reads)

    def _whole_pipeline(self) -> Any:
        """The pipeline; with the parts that this process lacks read for it, on the CPU."""
        held = self.parts()
        networks = [
            n for n, p in self.pipeline.components.items() if isinstance(p, torch.nn.Module)
        ]
        if len(held) == len(networks):
            return self.pipeline
        given = {**self.pipeline_settings, **held}
        return load_checkpoint(self.recipe.location, self.readable_classes(), **given)

    def save_merged(self, folder: Path) -> None:
        """A pipeline folder in float32 whose adapters are merged weight by weight: beside what is
        loaded, memory holds one weight."""
        if not lora.is_attached(self.network):
            self.save(folder)
        else:
            merging.save_pipeline(self._whole_pipeline(), folder, self._merged_readers())

    def save_comfyui(self, file: Path) -> None:
        if self.comfyui_keys is None:
            super().save_comfyui(file)
        else:
            comfyui.save(self.pipeline, self.part, file, self.comfyui_keys)

    def merged(self) -> Self:
        """A copy whose adapters are merged into plain diffusers modules, in float32. Other weights
        are shared with this one or, where this one keeps them rounded, the checkpoint's, read
        again."""
        if not lora.is_attached(self.network):
            return self

        # networks of diffusers around these tensors
        pipeline = copy.copy(self.pipeline)
        for part, read in self._merged_readers().items():
            network = self.denoisers[part]
            fresh = empty_copy(network)
            weights = {name: read(name) for name in lora.plain_state_dict(network)}
            fresh.load_state_dict(weights, assign=True)
            setattr(pipeline, part, fresh.to(self.device).eval())
        plain = self.with_network(self.denoiser_of(pipeline))
        plain.pipeline = pipeline
        return plain

    def _merged_readers(self) -> dict[str, merging.Read]:
        """Part -> how a weight of it is read with what its adapters add."""
        path = self.recipe.location
        found: dict[str, merging.Read] = {}
        for part, network in self.denoisers.items():
            exact = merging.exact_weights(network, path, self.readable_classes(), part)
            found[part] = lora.merged_reader(network, exact)
        return found
