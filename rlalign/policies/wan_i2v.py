"""Wan 2.1 and 2.2, image to video: any checkpoint in the format of diffusers'
WanImageToVideoPipeline, with a picture beside the latents or held in their first frame."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from rlalign.core.prompts import Prompt
from rlalign.core.records import Plan
from rlalign.core.registry import UserError
from rlalign.diffusion.condition import Condition, Words
from rlalign.policies._first_frames import FIELD, GREY, open_picture, source_of
from rlalign.policies._words import PromptMemory
from rlalign.policies.base import OWN_SIZE, Part
from rlalign.policies.wan import Wan, WanFamily, ask_one

TEXT_TOKENS = 512
"""Where a transformer that is told an image encoder's words looks for the text's."""


class WanImageToVideoFamily(WanFamily):
    """A live Wan pipeline that goes on from the picture which each prompt carries.

    Beside the latents the transformer is told the autoencoder's latents of the picture and of grey
    frames after it, with a mask of what is the picture; in 2.1 also an image encoder's words. The
    picture is a part of what guidance goes away from, and of the empty caption.

    2.2's 5B (``expand_timesteps``) holds the picture in the first latent frame instead: there the
    transformer sees the picture's latent at timestep 0, whatever the chain has. The chain has noise
    there as everywhere, and the prediction is prescribed: the velocity (x - picture) / s that leads
    to the picture. So its first frame ends on the picture's latent, as the pipeline's does, which
    overwrites it, and every step is a Gaussian with a density of which the held part does not
    depend on the weights: ratios, KL and gradients are those of the frames that follow.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    classes_by_name: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    trial_prompt = Prompt("", {FIELD: GREY})
    reads_embeddings: ClassVar[bool] = False

    recipe: WanI2V

    def __init__(self, recipe: WanI2V, pipeline: Any, device: str) -> None:
        super().__init__(recipe, pipeline, device)
        self.pictures = PromptMemory()
        if recipe.embeddings:
            raise UserError(
                "policy.embeddings must be empty for wan_i2v, whose prompts carry pictures, got"
                f" {recipe.embeddings!r}"
            )
        if self.sees_words_of_pictures and recipe.text_tokens != TEXT_TOKENS:
            raise UserError(
                f"policy.text_tokens must be {TEXT_TOKENS} for {self.folder!r}, whose transformer"
                f" looks for an image encoder's words before them, got {recipe.text_tokens}"
            )

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        super().check(pipeline, path)
        rule = f"policy.path: cannot read {path!r}: "
        config, z_dim = pipeline.transformer.config, pipeline.vae.config.z_dim
        held = bool(pipeline.config.get("expand_timesteps"))
        if held and pipeline.config.get("boundary_ratio") is not None:
            raise UserError(
                f"{rule}boundary_ratio in model_index.json must be null beside expand_timesteps:"
                " two denoisers with a held first frame are not read"
            )
        wanted = z_dim if held else 2 * z_dim + pipeline.vae_scale_factor_temporal
        if config.in_channels != wanted:
            kind = "latents alone" if held else "latents, a mask and a picture's latents"
            raise UserError(
                f"{rule}transformer: in_channels must be {wanted}, {kind}, got"
                f" {config.in_channels}; name another folder"
            )
        if config.image_dim is not None and getattr(pipeline, "image_encoder", None) is None:
            raise UserError(
                f"{rule}it has no image_encoder, which its transformer's image_dim asks for; name a"
                " complete folder"
            )

    @classmethod
    def role_of(cls, part: str) -> Part:
        """The autoencoder reads the pictures of prompts: whoever reads words has it."""
        return "words" if part == "vae" else super().role_of(part)

    def has(self, role: Part) -> bool:
        return super().has("words" if role == "vae" else role)

    @property
    def holds_first_frame(self) -> bool:
        """Whether the picture is the first latent frame, as in 2.2's 5B."""
        return bool(self.pipeline.config.get("expand_timesteps"))

    @property
    def sees_words_of_pictures(self) -> bool:
        """Whether the transformer is told an image encoder's words, as in 2.1."""
        return self.network.config.image_dim is not None

    @property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]  # 2.1's have two more
        plain = tuple(WanFamily.lora_targets)
        return (*plain, "add_k_proj", "add_v_proj") if self.sees_words_of_pictures else plain

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        found = super().encode(prompts, plan)
        seen = self._see(prompts, plan).tensors
        caption, empty, against = (
            None if words is None else Words({**words.tensors, **seen})
            for words in (found.caption, found.empty, found.against)
        )
        assert caption is not None and empty is not None
        return Condition(caption=caption, empty=empty, against=against)

    def _see(self, prompts: Sequence[str], plan: Plan) -> Words:
        """What the transformer is told of each prompt's picture, at the size of a plan."""
        size = [*self._pixels(plan), plan.frames]
        # a policy to count with has no pictures
        counts = self.vae.device.type == "meta"
        sources = [source_of(self.trial_prompt if counts else prompt) for prompt in prompts]
        keys = [json.dumps([source, *size]) for source in sources]
        return self.pictures.words(keys, self._read_picture)

    def _read_picture(self, key: str) -> Mapping[str, torch.Tensor]:
        """One row of each tensor, of a picture and a size that are written as JSON."""
        source, height, width, frames = json.loads(key)
        picture = open_picture(source)
        pixels_BCHW = self.pipeline.video_processor.preprocess(picture, height=height, width=width)
        device = self.vae.device
        first_BCFHW = pixels_BCHW[:, :, None].to(device)
        if self.holds_first_frame:
            held = self.vae.encode(first_BCFHW).latent_dist.mode()
            return {"picture_BCFHW": self.from_autoencoder(held)}
        grey_BCFHW = first_BCFHW.new_zeros(1, 3, frames - 1, height, width)
        encoded = self.vae.encode(torch.cat([first_BCFHW, grey_BCFHW], dim=2))
        latents_BCFHW = self.from_autoencoder(encoded.latent_dist.mode())

        # the mask has a channel for each frame of a latent
        channels = self.pipeline.vae_scale_factor_temporal
        mask_BCFHW = latents_BCFHW.new_zeros(1, channels, *latents_BCFHW.shape[2:])
        mask_BCFHW[:, :, 0] = 1.0
        found = {"picture_BCFHW": torch.cat([mask_BCFHW, latents_BCFHW], dim=1)}
        if self.sees_words_of_pictures:
            found["picture_BLD"] = self.pipeline.encode_image(picture, device)
        return found

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        if self.holds_first_frame:
            return self._predict_held(x, timestep_B, words)
        told = torch.cat([x, words["picture_BCFHW"].to(x.dtype)], dim=1)
        picture_BLD = words.tensors.get("picture_BLD")
        return self.ask_experts(ask_one, timestep_B, told, words["embeds_BLD"], picture_BLD)

    def _predict_held(
        self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words
    ) -> torch.Tensor:
        """The velocity to the picture in the first latent frame, and what the transformer says of
        the others."""
        picture_BCFHW = words["picture_BCFHW"].to(x.dtype)
        told = torch.cat([picture_BCFHW, x[:, :, 1:]], dim=2)
        frames, height, width = x.shape[2:]
        tokens = (height // self.patch) * (width // self.patch)
        timestep_BN = timestep_B.float()[:, None].repeat(1, frames * tokens)
        timestep_BN[:, :tokens] = 0.0
        said = ask_one(self.network, timestep_BN, told, words["embeds_BLD"])

        # at level 0 nothing is left to go
        sigma = (timestep_B.double() / self.path.train_steps).to(x).reshape(-1, 1, 1, 1, 1)
        safe = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
        held = torch.where(sigma > 0, (x[:, :, :1] - picture_BCFHW) / safe, 0.0)
        return torch.cat([held, said[:, :, 1:].to(x.dtype)], dim=2)


class WanI2V(Wan):
    """A Wan checkpoint that goes on from a picture (transformer of clips, rectified flow), from a
    folder or a hub id.

    A prompt's record has the picture in its field image: a file's path, or a data URI. Source: Wan
    Team 2025, arXiv:2503.20314.
    """

    family = WanImageToVideoFamily
