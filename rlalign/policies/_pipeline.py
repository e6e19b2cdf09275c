"""What the families of diffusers' pipelines share: a folder read part by part, prompts read once,
latents of an autoencoder, a LoRA in diffusers' format."""

from __future__ import annotations

import copy
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field

from rlalign.core.finite import refuse, refuse_pixels
from rlalign.core.locations import LocalPathOrHubId
from rlalign.core.records import Plan
from rlalign.core.registry import Before, UserError
from rlalign.diffusion.condition import Condition, Words
from rlalign.diffusion.paths import NoisePath, Tokens
from rlalign.diffusion.predictions import PredictionType
from rlalign.networks import comfyui, lora
from rlalign.networks.pipelines.checkpoints import load_checkpoint, read_network
from rlalign.networks.pipelines.files import check_files
from rlalign.networks.pipelines.fitting import check_parts, default_size, try_out
from rlalign.networks.pipelines.loading import empty_copy
from rlalign.networks.pipelines.schedulers import read_flow, say_steps
from rlalign.networks.precision import Precision
from rlalign.policies._family import OWN_SIZE, Family, refuse_frames
from rlalign.policies._recipe import PolicyRecipe

REMEMBERED_BYTES = 2**28
"""Of prompts' words that are kept (0.25 MB each in Stable Diffusion 1.5, 5.5 in 3), so that a long
prompt list fills no memory."""
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Endings of the names of an attention's layers."""
JOINT_TARGETS = (*ATTENTION_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The same of an attention that joins the words and the picture."""
NegativePrompt = Annotated[
    str,
    Before(""),
    Field(description="what plan.guidance goes away from, as a call's negative_prompt"),
]


class PipelineRecipe(PolicyRecipe):
    """Base of the settings of a family whose checkpoints are diffusers' pipelines."""

    family: ClassVar[type[PipelineFamily]]  # type: ignore[assignment]  # set by each

    path: LocalPathOrHubId = Field(
        description="pipeline folder, its weights in one .safetensors file, or hub id"
    )
    negative_prompt: NegativePrompt = ""

    @property
    def location(self) -> str:
        """What ``path`` means."""
        return self.path

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Part -> in which it is read, where that is not float32."""
        return {self.family.part: self.denoiser_dtype}

    def build(self, device: str) -> PipelineFamily:
        """Loads safetensors weights alone."""
        family = self.family
        place = self.location
        self._check_files()
        pipeline = load_checkpoint(
            place, family.pipeline_classes, self.dtypes, **family.pipeline_settings
        )
        family.check(pipeline, place)
        say_steps(place, Path(pipeline.config["_name_or_path"]))
        return family(self, pipeline, device)

    def announce(self) -> None:
        self._check_files()
        say_steps(self.location)

    def _check_files(self) -> None:
        """Refuses a folder whose files are damaged, or are not there."""
        family = self.family
        unread = family.pipeline_settings
        check_files(self.location, family.pipeline_classes, family.part, unread)


class PromptMemory:
    """The words of texts, each read once and alone, so that its numbers do not depend on its
    neighbours. Replicas share it: text encoders and tokenizers are used by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.rows: dict[str, Mapping[str, torch.Tensor]] = {}
        self._bytes = 0

    def words(
        self, texts: Sequence[str], read: Callable[[str], Mapping[str, torch.Tensor]]
    ) -> Words:
        """The rows of all texts; ``read`` gives one row of each tensor."""
        with self._lock:
            rows = [self._row(text, read) for text in texts]
        return Words({name: torch.cat([row[name] for row in rows]) for name in rows[0]})

    def _row(
        self, text: str, read: Callable[[str], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        if text not in self.rows:
            with torch.no_grad():
                row = read(text)
            if self._bytes >= REMEMBERED_BYTES:
                self.rows.clear()
                self._bytes = 0
            self.rows[text] = row
            self._bytes += sum(tensor.nbytes for tensor in row.values())
        return self.rows[text]


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
    reads_adapters: ClassVar[bool] = True
    comfyui_keys: ClassVar[comfyui.Keys | None] = None
    """Under which keys ComfyUI reads a LoRA of this family, where plain diffusers reads them
    too."""

    network: Any
    """diffusers' denoiser."""

    def __init__(self, recipe: PipelineRecipe, pipeline: Any, device: str) -> None:
        self.recipe = recipe
        self.pipeline = pipeline
        self.device = device
        for name, module in self.parts().items():
            module.to(device).eval().requires_grad_(name == self.part)
        self.network = getattr(pipeline, self.part)
        self.vae = pipeline.vae
        self.own_per_thread = ("vae",) if hasattr(self.vae, "clear_cache") else ()
        self.path, self.prediction = self.read_path()
        self.memory = PromptMemory()

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        """Refuses, by name, what the family would misread."""
        check_parts(pipeline, path, cls.needs)

    def parts(self) -> Mapping[str, torch.nn.Module]:
        components = self.pipeline.components.items()
        return {name: part for name, part in components if isinstance(part, torch.nn.Module)}

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
        return self.memory.words(texts, self.read)

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
        scaled = self.to_autoencoder(latents)
        still = self._reads_clips and not self.draws_clips
        pixels = self.vae.decode(scaled.unsqueeze(2) if still else scaled, return_dict=False)[0]
        refuse_pixels(pixels, latents)
        media = (pixels / 2 + 0.5).clamp(0, 1)
        return media.transpose(1, 2) if self._reads_clips else media.unsqueeze(1)

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
        media = media_BFCHW.transpose(1, 2) if self._reads_clips else media_BFCHW[:, 0]
        encoded = self.vae.encode(media * 2 - 1)
        drawn = getattr(encoded, "latent_dist", None)
        found = [encoded[0]] if drawn is None else [drawn.mode(), drawn.std]
        for tensor in found:
            refuse(tensor, "the policy's autoencoder (its encoder)")
        still = self._reads_clips and not self.draws_clips
        latents, *rest = (tensor[:, :, 0] if still else tensor for tensor in found)
        return latents, rest[0] if rest else None

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
        self.network.enable_gradient_checkpointing()

    def attach_saved(self, name: str, *, rank: int, alpha: float) -> None:
        lora.attach_saved(self.pipeline, self.part, name, rank=rank, alpha=alpha)

    def try_out(self, precision: Precision) -> None:
        side = self.trial_side * self.factor
        try_out(self, self.recipe.location, Plan(height=side, width=side), precision)

    # --- files ------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """A pipeline folder (all weights), or ``pytorch_lora_weights.safetensors`` that
        load_lora_weights reads."""
        if lora.is_attached(self.network):
            lora.save(self.pipeline, self.part, folder)
        else:
            self.pipeline.save_pretrained(folder, safe_serialization=True)

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

        # an adapter is finer than bfloat16 weights can hold
        weights = lora.plain_state_dict(self.network)
        if any(p.dtype != torch.float32 for p in self.network.parameters()):
            again = read_network(self.recipe.location, self.pipeline_classes, self.part)
            weights = again.state_dict()
            del again
        lora.merge_into(weights, self.network)

        # a network of diffusers around these tensors
        fresh = empty_copy(self.network)
        fresh.load_state_dict(weights, assign=True)
        plain = self.with_network(fresh.to(self.device).eval())
        plain.pipeline = copy.copy(self.pipeline)
        setattr(plain.pipeline, self.part, plain.network)
        return plain
