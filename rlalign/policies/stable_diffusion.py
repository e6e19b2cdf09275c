"""Stable Diffusion 1.x and 2.x: any checkpoint in the format of diffusers' StableDiffusionPipeline."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign import lora
from rlalign.diffusion.paths import VariancePreserving
from rlalign.policies.base import Condition, Policy, PolicyRecipe
from rlalign.records import Plan
from rlalign.registry import UserError

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
REMEMBERED_PROMPTS = 1024
"""Prompts whose embeddings are kept (0.25 MB each in Stable Diffusion 1.5), so that a long prompt list fills no memory."""


class StableDiffusion(PolicyRecipe):
    """A Stable Diffusion 1.x or 2.x checkpoint (UNet, epsilon or v prediction) from a folder or a hub id.

    Source: Rombach 2022, arXiv:2112.10752.
    """

    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS

    path: str = Field(description="pipeline folder, or hub id")

    def load(self, device: str) -> StableDiffusionPolicy:
        """Loads safetensors weights alone; a missing or damaged checkpoint is a UserError."""
        pipeline = load_pipeline(self.path, safety_checker=None)
        return self.ready(StableDiffusionPolicy(pipeline, device, lora_rank=self.lora_rank, lora_alpha=self.lora_alpha))


def load_pipeline(path: str, kind: str = "StableDiffusionPipeline", **settings: Any) -> Any:
    """A diffusers pipeline of this class in float32, or a UserError that names the file and the way out."""
    import diffusers
    from diffusers.utils import logging as diffusers_logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()  # a bar per loaded part would tear the run's own
    transformers_logging.disable_progress_bar()

    folder = Path(path)
    if (folder.is_absolute() or path.startswith(".")) and not (folder / "model_index.json").is_file():
        raise UserError(
            f"policy.path must be a diffusers pipeline folder or a hub id, got {path!r} without model_index.json"
        )
    try:
        if folder.is_dir():
            # parts that a folder says it lacks, such as Stable Diffusion 3's T5, must be named to diffusers
            index = dict(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
            settings = {**{n: None for n, kind in index.items() if kind == [None, None]}, **settings}
        pipeline = getattr(diffusers, kind).from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, local_files_only=folder.is_dir(), **settings
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"policy.path: cannot load {path!r}: {reason}; is the folder complete and undamaged?"
        ) from error
    for number in ("", "_2"):
        tokenizer, text = (pipeline.components.get(f"{part}{number}") for part in ("tokenizer", "text_encoder"))
        if tokenizer is None or text is None:
            continue
        if len(tokenizer) <= 2 or tokenizer.model_max_length > text.config.max_position_embeddings:
            # transformers makes an empty tokenizer where its files are missing: every prompt would read the same
            raise UserError(
                f"policy.path: cannot load {path!r}: its tokenizer{number} is incomplete; is the folder complete and undamaged?"
            )
    return pipeline


class StableDiffusionPolicy(Policy):
    """A live Stable Diffusion pipeline as a policy."""

    network: Any
    """diffusers' UNet2DConditionModel."""
    part: ClassVar[str] = "unet"
    """What the pipeline calls its denoiser."""
    lora_targets: ClassVar[tuple[str, ...]] = LORA_TARGETS
    _reading: ClassVar[threading.Lock] = threading.Lock()
    """Replicas share a tokenizer, whose padding is a state that each call sets: one thread reads at a time."""

    def __init__(self, pipeline: Any, device: str, *, lora_rank: int = 0, lora_alpha: float = 0.0) -> None:
        self.pipeline = pipeline
        self.device = device
        self.network = getattr(pipeline, self.part).to(device).eval()
        self.vae = pipeline.vae.to(device).eval().requires_grad_(False)
        self._take_words_and_path()
        if lora_rank:
            lora.attach(self.network, rank=lora_rank, alpha=lora_alpha, targets=self.lora_targets)
        else:
            self.network.requires_grad_(True)
        self.reference = {} if lora_rank else self.weights()

    def _take_words_and_path(self) -> None:
        """Text encoders, noise path and prediction type of the pipeline."""
        pipeline, scheduler = self.pipeline, self.pipeline.scheduler.config
        self.text_encoder = pipeline.text_encoder.to(self.device).eval().requires_grad_(False)
        self.tokenizer = pipeline.tokenizer
        self.path = VariancePreserving(
            pipeline.scheduler.alphas_cumprod,
            spacing=scheduler.timestep_spacing,
            offset=scheduler.steps_offset,
            ends_clean=scheduler.get("set_alpha_to_one", True),
        )
        self.prediction = scheduler.prediction_type
        self._encoded: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def _embed(self, prompt: str) -> torch.Tensor:
        """(L, D), alone in its batch so that the numbers do not depend on its neighbours; kept for the next time."""
        kept = self._encoded.get(prompt)
        if kept is None:
            tokens = self.tokenizer(
                prompt,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            mask = tokens.attention_mask if self.text_encoder.config.to_dict().get("use_attention_mask") else None
            kept = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0][0]
            if len(self._encoded) >= REMEMBERED_PROMPTS:
                self._encoded.clear()
            self._encoded[prompt] = kept
        return kept

    def encode(self, prompts: Sequence[str]) -> Condition:
        with self._reading:
            embeds, empty = [self._embed(p) for p in prompts], self._embed("")
        return Condition(embeds_BLD=torch.stack(embeds), uncond_BLD=torch.stack([empty] * len(prompts)))

    def checkpoint_gradients(self) -> None:
        self.network.enable_gradient_checkpointing()

    def predict(
        self,
        x: torch.Tensor,
        timestep_B: torch.Tensor,
        embeds_BLD: torch.Tensor,
        pooled_BD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.network(x, timestep_B, encoder_hidden_states=embeds_BLD, return_dict=False)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return (pixels / 2 + 0.5).clamp(0, 1).unsqueeze(1)

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(media_BFCHW[:, 0] * 2 - 1).latent_dist.mode() * self.vae.config.scaling_factor

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        size = self.network.config.sample_size * factor
        height, width = plan.height or size, plan.width or size
        if height % factor or width % factor:
            raise UserError(f"plan.height and plan.width must be multiples of {factor}, got {height} x {width}")
        return (self.network.config.in_channels, height // factor, width // factor)

    def save(self, folder: Path) -> None:
        """A pipeline folder (all weights), or ``pytorch_lora_weights.safetensors`` that load_lora_weights reads."""
        if not lora.is_attached(self.network):
            self.pipeline.save_pretrained(folder, safe_serialization=True)
            return
        from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

        layers = self._lora_layers()
        # without the adapter's own settings diffusers would take alpha to be the rank
        settings = self.network.peft_config[lora.ADAPTER].to_dict()
        # the same policy is the same file, whichever process writes it: sets and the header in an order of their own
        settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
        named = {f"{self.part}_lora_layers": layers, f"{self.part}_lora_adapter_metadata": settings}
        self.pipeline.save_lora_weights(folder, safe_serialization=True, **named)
        lora.order_header(folder / LORA_WEIGHT_NAME_SAFE)

    def _lora_layers(self) -> dict[str, torch.Tensor]:
        """The adapters' weights under the names that the pipeline's loader knows."""
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        return convert_state_dict_to_diffusers(get_peft_model_state_dict(self.network))

    def merged(self) -> StableDiffusionPolicy:
        """A copy whose adapters are merged into plain diffusers modules: what saves as a pipeline folder."""
        if not lora.is_attached(self.network):
            return self
        plain = copy.copy(self)
        merged = copy.deepcopy(self.network).float()  # an adapter is finer than bfloat16 weights can hold
        lora.merge(merged)
        fresh = type(self.network).from_config(self.network.config)
        fresh.load_state_dict(lora.plain_state_dict(merged))
        plain.network = fresh.to(self.device).eval()
        plain.pipeline = copy.copy(self.pipeline)
        setattr(plain.pipeline, self.part, plain.network)
        return plain
