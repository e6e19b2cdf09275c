"""A model family of a test's own, in one file: clips of five frames, 5-D latents, words with a mask
and time ids, a guidance that the network is told, and another that is mixed in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file

from rlalign.core.records import Plan
from rlalign.core.registry import Before, UserError
from rlalign.diffusion.noise import generator
from rlalign.diffusion.paths import LineShift, RectifiedFlow, Tokens
from rlalign.policies.base import OWN_SIZE, Condition, Family, PolicyRecipe, Words

CHANNELS = 4
WIDTH = 8
TOKENS = 6
SIDE = 4
"""Latent channels, width of an embedding, tokens of a prompt, pixels of a latent's side."""


class Network(torch.nn.Module):
    """(latent, time, words) -> velocity, place by place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(CHANNELS + WIDTH + 5, 16)
        self.outer = torch.nn.Linear(16, CHANNELS)

    def forward(self, x_BCFHW: torch.Tensor, told_BD: torch.Tensor) -> torch.Tensor:
        x_BFHWC = x_BCFHW.permute(0, 2, 3, 4, 1)
        told = told_BD[:, None, None, None].expand(*x_BFHWC.shape[:-1], -1)
        hidden = torch.nn.functional.silu(self.inner(torch.cat([x_BFHWC, told], dim=-1)))
        return self.outer(hidden).permute(0, 4, 1, 2, 3)


class ClipsFamily(Family):
    """Latents (4, F', H/4, W/4), F' = (F - 1) / 2 + 1; the autoencoder keeps a cache on itself."""

    prediction = "flow"
    lora_targets = ("inner", "outer")
    own_per_thread = ("vae",)

    def __init__(self, device: str, recipe: Clips) -> None:
        from diffusers import AutoencoderKLWan

        self.device = device
        self.embedded_guidance = recipe.embedded_guidance
        self.negative_prompt = recipe.negative_prompt
        tokens = Tokens(side=SIDE, frames=2, height=16, width=16)
        line = LineShift(tokens=tokens, base_tokens=16, max_tokens=256)
        self.path = RectifiedFlow(last=0.0, beyond=1, terminal=0.05, moving=line)
        settings: dict[str, Any] = {"base_dim": 4, "z_dim": CHANNELS, "dim_mult": [1, 1, 1]}
        settings |= {"num_res_blocks": 1, "temperal_downsample": [False, True]}
        settings |= {"scale_factor_temporal": 2, "scale_factor_spatial": SIDE}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = Network().eval().to(device)
            self.vae = AutoencoderKLWan(
                **settings, latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS
            )
        self.vae = self.vae.eval().requires_grad_(False).to(device)

    def words(self, texts: Sequence[str], plan: Plan) -> Words:
        """Embeddings at one width with a mask, (height, width, frames), and the told guidance."""
        embeds_BLD = torch.zeros(len(texts), TOKENS, WIDTH)
        mask_BL = torch.zeros(len(texts), TOKENS, dtype=torch.bool)
        for row, text in enumerate(texts):
            for place, word in enumerate(text.split()[:TOKENS]):
                drawn = generator("clips", word).standard_normal(WIDTH, dtype=np.float32)
                embeds_BLD[row, place] = torch.from_numpy(drawn)
                mask_BL[row, place] = True
        size = [*self.drawn_size(plan), plan.frames]
        tensors = {
            "embeds_BLD": embeds_BLD,
            "mask_BL": mask_BL,
            "time_ids_B3": torch.tensor([size] * len(texts)),
            "guidance_B": torch.full((len(texts),), self.embedded_guidance),
        }
        return Words(tensors).to(self.device)

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        rows = len(prompts)
        return Condition(
            caption=self.words(prompts, plan),
            empty=self.words([""] * rows, plan),
            against=self.words([self.negative_prompt] * rows, plan),
        )

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        assert words["mask_BL"].dtype == torch.bool
        assert words["time_ids_B3"].dtype == torch.int64
        height, width, _ = words["time_ids_B3"][0].tolist()
        assert (height, width) == (x.shape[-2] * SIDE, x.shape[-1] * SIDE)
        kind = next(self.network.parameters()).dtype
        told = [
            words.summary_BD.to(kind),
            words["time_ids_B3"].to(kind) / 100.0,
            words["guidance_B"][:, None].to(kind) / 10.0,
            timestep_B[:, None].to(kind) / 1000.0,
        ]
        return self.network(x.to(kind), torch.cat(told, dim=1))

    def combine(self, cond: torch.Tensor, uncond: torch.Tensor, guidance: float) -> torch.Tensor:
        """Guided, at the length that the caption's own prediction has at each place."""
        mixed = uncond + guidance * (cond - uncond)
        return mixed * cond.norm(dim=1, keepdim=True) / mixed.norm(dim=1, keepdim=True)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels_BCFHW = self.vae.decode(latents, return_dict=False)[0]
        return (pixels_BCFHW / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(media_BFCHW.transpose(1, 2) * 2 - 1).latent_dist.mode()

    def drawn_size(self, plan: Plan) -> tuple[int, int]:
        return plan.height or 16, plan.width or 16

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        height, width = self.drawn_size(plan)
        if plan.frames % 2 != 1 or height % SIDE or width % SIDE:
            raise UserError(f"plan.frames must be odd and sides multiples of {SIDE}")
        return (CHANNELS, (plan.frames - 1) // 2 + 1, height // SIDE, width // SIDE)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {n: t.contiguous() for n, t in self.network.state_dict().items()}
        save_file(tensors, folder / "clips.safetensors")


class Clips(PolicyRecipe):
    """A random denoiser of clips under a random causal video autoencoder. Source: none, a test's
    own."""

    family = ClipsFamily

    embedded_guidance: float = Field(default=3.5, ge=0.0, description="what the network is told")
    negative_prompt: Annotated[str, Before("")] = Field(
        default="noise", description="what plan.guidance goes away from"
    )

    def build(self, device: str) -> ClipsFamily:
        return ClipsFamily(device, self)
