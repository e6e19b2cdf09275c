"""Stable Diffusion 1.x and 2.x: any checkpoint in the format of diffusers'
StableDiffusionPipeline."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from rlalign.core.finite import refuse, refuse_pixels
from rlalign.core.locations import LocalPathOrHubId
from rlalign.core.records import Plan
from rlalign.core.registry import Before, UserError
from rlalign.diffusion.paths import VariancePreserving
from rlalign.networks import lora
from rlalign.networks.pipelines.fitting import check_unet, default_size, try_out
from rlalign.networks.pipelines.loading import load_pipeline
from rlalign.networks.pipelines.schedulers import check_variance_preserving, say_steps
from rlalign.policies.base import OWN_SIZE, Condition, Policy, PolicyRecipe, Words, refuse_frames

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TRIAL_SIDE = 8
"""Latents of a side, of the pass that a checkpoint is tried out with: one at the coarsest level of
a UNet of four."""
NegativePrompt = Annotated[
    str,
    Before(""),
    Field(description="what plan.guidance goes away from, as a call's negative_prompt"),
]
REMEMBERED_PROMPTS = 1024
"""Prompts whose embeddings are kept (0.25 MB each in Stable Diffusion 1.5), so that a long prompt
list fills no memory."""


class StableDiffusion(PolicyRecipe):
    """A Stable Diffusion 1.x or 2.x checkpoint (UNet, epsilon or v prediction) from a folder or a
    hub id.

    Source: Rombach 2022, arXiv:2112.10752.
    """

    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)

    path: LocalPathOrHubId = Field(description="pipeline folder, or hub id")
    negative_prompt: NegativePrompt = ""

    def load(self, device: str) -> StableDiffusionPolicy:
        """Loads safetensors weights alone; a missing, damaged or unknown checkpoint is a
        UserError."""
        pipeline = load_stable_diffusion(self.path, self.denoiser_dtype)
        policy = StableDiffusionPolicy(
            pipeline, device, **self.lora_settings, negative_prompt=self.negative_prompt
        )
        return try_out(self.ready(policy), self.path, TRIAL_SIDE)

    def announce(self) -> None:
        say_steps(self.path)


def load_stable_diffusion(path: str, dtype: torch.dtype) -> Any:
    """A Stable Diffusion pipeline under ``path``, its denoiser in ``dtype``, checked: nothing in it
    that the policy would misread."""
    pipeline = load_pipeline(
        path, StableDiffusion.pipeline_classes, {"unet": dtype}, safety_checker=None
    )
    check_unet(pipeline, path)
    check_variance_preserving(pipeline.scheduler, path)
    say_steps(path, Path(pipeline.config["_name_or_path"]))
    return pipeline


class StableDiffusionPolicy(Policy):
    """A live Stable Diffusion pipeline as a policy."""

    network: Any
    """diffusers' UNet2DConditionModel."""
    part: ClassVar[str] = "unet"
    """What the pipeline calls its denoiser."""
    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS
    _reading: ClassVar[threading.Lock] = threading.Lock()
    """Replicas share a tokenizer, whose padding is a state that each call sets: one thread reads at
    a time."""

    def __init__(
        self,
        pipeline: Any,
        device: str,
        *,
        lora_rank: int = 0,
        lora_alpha: float = 0.0,
        adapter: str = "",
        negative_prompt: str = "",
    ) -> None:
        self.pipeline = pipeline
        self.negative_prompt = negative_prompt
        self.device = device
        if adapter:
            lora.attach_saved(pipeline, self.part, adapter, rank=lora_rank, alpha=lora_alpha)
        self.network = getattr(pipeline, self.part).to(device).eval()
        self.vae = pipeline.vae.to(device).eval().requires_grad_(False)
        self._take_words_and_path()
        if lora_rank and not adapter:
            lora.attach(self.network, rank=lora_rank, alpha=lora_alpha, targets=self.lora_targets)
        elif not adapter:
            self.network.requires_grad_(True)
        self.reference = {} if lora_rank and not adapter else self.weights()

    def _take_words_and_path(self) -> None:
        """Text encoders, noise path and prediction type of the pipeline."""
        pipeline = self.pipeline
        scheduler = self.pipeline.scheduler.config
        self.text_encoder = pipeline.text_encoder.to(self.device).eval().requires_grad_(False)
        self.tokenizer = pipeline.tokenizer
        self.path = VariancePreserving(
            pipeline.scheduler.alphas_cumprod,
            spacing=scheduler.get("timestep_spacing", "leading"),
            offset=scheduler.get("steps_offset", 1),
            ends_clean=bool(scheduler.get("set_alpha_to_one", True)),
            variance_type=scheduler.get("variance_type") or "fixed_small",
        )
        self.prediction = scheduler.prediction_type
        self._encoded: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def _embed(self, prompt: str) -> torch.Tensor:
        """(L, D), alone in its batch so that the numbers do not depend on its neighbours; kept for
        the next time."""
        kept = self._encoded.get(prompt)
        if kept is None:
            # a prompt is cut to the length that the encoder reads
            tokens = self.tokenizer(
                prompt,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            mask = (
                tokens.attention_mask
                if self.text_encoder.config.to_dict().get("use_attention_mask")
                else None
            )
            kept = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0][0]

            # few prompts are remembered, so that memory is bounded
            if len(self._encoded) >= REMEMBERED_PROMPTS:
                self._encoded.clear()
            self._encoded[prompt] = kept
        return kept

    def parts(self) -> Mapping[str, torch.nn.Module]:
        return {
            n: part
            for n, part in self.pipeline.components.items()
            if isinstance(part, torch.nn.Module)
        }

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        rows = len(prompts)
        with self._reading:
            return Condition(
                caption=self.words(prompts),
                empty=self.words([""] * rows),
                against=self.words([self.negative_prompt] * rows) if self.negative_prompt else None,
            )

    def words(self, texts: Sequence[str]) -> Words:
        """What the denoiser is told of each text."""
        return Words({"embeds_BLD": torch.stack([self._embed(text) for text in texts])})

    def checkpoint_gradients(self) -> None:
        self.network.enable_gradient_checkpointing()

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        embeds_BLD = words["embeds_BLD"]
        return self.network(x, timestep_B, encoder_hidden_states=embeds_BLD, return_dict=False)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        refuse_pixels(pixels, latents)
        return (pixels / 2 + 0.5).clamp(0, 1).unsqueeze(1)

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        return self._encoded_mode(media_BFCHW) * self.vae.config.scaling_factor

    def _encoded_mode(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        """What the encoder gives, in its own scale: its posterior's mode, or the latents of one
        that has no posterior."""
        encoded = self.vae.encode(media_BFCHW[:, 0] * 2 - 1)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        refuse(latents, "the policy's autoencoder (its encoder)")
        return latents

    def posterior(self, media_BFCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        encoded = self.vae.encode(media_BFCHW[:, 0] * 2 - 1)
        if not hasattr(encoded, "latent_dist"):
            return self.encode_media(media_BFCHW), None
        found = encoded.latent_dist
        refuse(found.parameters, "the policy's autoencoder (its encoder)")

        # the scale of latents, and their shift in families that have one
        shift = self.vae.config.get("shift_factor") or 0.0
        scale = self.vae.config.scaling_factor
        return (found.mode() - shift) * scale, found.std * scale

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

    def drawn_size(self, plan: Plan) -> tuple[int, int]:
        self.latent_shape(plan)  # refuses what the decoder would round
        return self._pixels(plan)

    def own_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that the checkpoint draws by itself, where it says so."""
        own = default_size(self.network.config.get("sample_size"), self.folder)
        factor = self.pipeline.vae_scale_factor
        return None if own is None else (own[0] * factor, own[1] * factor)

    @property
    def folder(self) -> str:
        """Where the pipeline was read from, for messages."""
        return str(self.pipeline.config.get("_name_or_path", ""))

    def _shown(self, plan: Plan, height: int, width: int) -> str:
        """A size in an error message, with where it comes from."""
        source = (
            ""
            if plan.height and plan.width
            else f" (sample_size in {self.part}/config.json stands in for 0)"
        )
        return f"{height} x {width}{source}"

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        refuse_frames(plan)
        factor = self.pipeline.vae_scale_factor
        height, width = self._pixels(plan)
        if height % factor or width % factor:
            raise UserError(
                f"plan.height and plan.width must be multiples of {factor}, got"
                f" {self._shown(plan, height, width)}"
            )
        return (self.network.config.in_channels, height // factor, width // factor)

    def save(self, folder: Path) -> None:
        """A pipeline folder (all weights), or ``pytorch_lora_weights.safetensors`` that
        load_lora_weights reads."""
        # without an adapter all weights are trained
        if not lora.is_attached(self.network):
            self.pipeline.save_pretrained(folder, safe_serialization=True)
            return
        from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

        # the matrices and their settings, in one file
        layers = self._lora_layers()

        # without the adapter's own settings diffusers would take alpha to be the rank
        settings = self.network.peft_config[lora.ADAPTER].to_dict()

        # the same policy is the same file, whichever process writes it: sets and the header in an
        # order of their own
        settings = {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in settings.items()
        }
        named = {f"{self.part}_lora_layers": layers, f"{self.part}_lora_adapter_metadata": settings}
        self.pipeline.save_lora_weights(folder, safe_serialization=True, **named)
        lora.order_header(folder / LORA_WEIGHT_NAME_SAFE)

    def _lora_layers(self) -> dict[str, torch.Tensor]:
        """The adapters' weights under the names that the pipeline's loader knows."""
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        return convert_state_dict_to_diffusers(get_peft_model_state_dict(self.network))

    def merged(self) -> StableDiffusionPolicy:
        """A copy whose adapters are merged into plain diffusers modules: what saves as a pipeline
        folder."""
        if not lora.is_attached(self.network):
            return self
        plain = copy.copy(self)
        merged = copy.deepcopy(
            self.network
        ).float()  # an adapter is finer than bfloat16 weights can hold
        lora.merge(merged)
        fresh = type(self.network).from_config(self.network.config)
        fresh.load_state_dict(lora.plain_state_dict(merged))
        plain.network = fresh.to(self.device).eval()
        plain.pipeline = copy.copy(self.pipeline)
        setattr(plain.pipeline, self.part, plain.network)
        return plain
