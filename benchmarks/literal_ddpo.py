"""A literal single-process DDPO round, as public scripts write it: what the plain loop is measured
against.

fp32, torch's default threads, diffusers' scheduler step by step, the old log-probs from a separate
replay forward without gradients, then one forward and backward per (minibatch, timestep) with
gradient accumulation. It takes rlalign's prompts, keyed noise and AdamW settings, so that its
numbers can be compared with the loop's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rlalign.algorithms.ddpo import DDPO
from rlalign.core.records import Unit
from rlalign.diffusion.noise import unit_noise
from rlalign.learning.settings import LearnerSettings
from rlalign.policies.base import Policy


class LiteralDDPO:
    """State of the literal loop: pipeline parts, optimiser, and the trained UNet."""

    def __init__(
        self,
        policy: Policy,
        algorithm: DDPO,
        settings: LearnerSettings,
        *,
        train_batch: int,
    ) -> None:
        family: Any = policy.family
        self.unet, self.vae, pipeline = policy.network, family.vae, family.pipeline
        self.tokenizer, self.text_encoder = pipeline.tokenizer, pipeline.text_encoder
        self.scheduler, self.algorithm, self.settings, self.train_batch = (
            pipeline.scheduler,
            algorithm,
            settings,
            train_batch,
        )
        self.optimiser = torch.optim.AdamW(
            self.unet.parameters(),
            lr=settings.lr,
            **settings.optimizer.model_dump(exclude={"name"}),
        )

    def embed(self, prompts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            return self.text_encoder(tokens)[0]

    def step(
        self, x: torch.Tensor, t: int, embeds: torch.Tensor, eta: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std of the next latent, written out as in DDIM's equation 12."""
        times = torch.full((x.shape[0],), t, dtype=torch.long)
        noise = self.unet(x, times, encoder_hidden_states=embeds).sample
        previous = (
            t - self.scheduler.config.num_train_timesteps // self.scheduler.num_inference_steps
        )
        now = self.scheduler.alphas_cumprod[t]
        before = (
            self.scheduler.alphas_cumprod[previous]
            if previous >= 0
            else self.scheduler.final_alpha_cumprod
        )
        clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
        variance = (1 - before) / (1 - now) * (1 - now / before)
        std = eta * variance.sqrt()
        return before.sqrt() * clean + (1 - before - std**2).sqrt() * noise, std

    @staticmethod
    def log_prob(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        return (-((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)).mean(
            dim=(1, 2, 3)
        )

    def round(
        self, units: Sequence[Unit], score: Callable[[torch.Tensor, Sequence[str]], torch.Tensor]
    ) -> np.ndarray:
        """Sample, score, replay, train. Returns the rewards."""
        plan = units[0].plan
        self.scheduler.set_timesteps(plan.steps)
        times = [int(t) for t in self.scheduler.timesteps]
        latents, rewards, prompts = [], [], []
        for unit in units:
            embeds, x = self.embed(unit.prompts), unit_noise(unit, 0, (4, 16, 16))
            chain = [x]
            with torch.no_grad():
                for k, t in enumerate(times):
                    mean, std = self.step(x, t, embeds, plan.eta)
                    x = mean + std * unit_noise(unit, k + 1, (4, 16, 16))
                    chain.append(x)
                pictures = (
                    self.vae.decode(x / self.vae.config.scaling_factor).sample / 2 + 0.5
                ).clamp(0, 1)
            quantised = (pictures * 255).round() / 255
            latents.append(torch.stack(chain, dim=1))
            rewards.append(score(quantised[:, None], unit.prompts))
            prompts += list(unit.prompts)
        all_latents, reward = torch.cat(latents), torch.cat(rewards).numpy()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-8)
        clipped = torch.from_numpy(
            np.clip(advantage, -self.algorithm.advantage_clip, self.algorithm.advantage_clip)
        ).float()
        old = self.replay(all_latents, prompts, times, plan.eta)
        self.train(all_latents, prompts, times, plan.eta, old, clipped)
        return reward

    @torch.no_grad()
    def replay(
        self, latents: torch.Tensor, prompts: Sequence[str], times: Sequence[int], eta: float
    ) -> torch.Tensor:
        """(samples, steps) log-probs under the weights before the update."""
        rows = []
        for start in range(0, len(latents), self.train_batch):
            part = latents[start : start + self.train_batch]
            embeds = self.embed(prompts[start : start + self.train_batch])
            columns = []
            for k, t in enumerate(times):
                mean, std = self.step(part[:, k], t, embeds, eta)
                columns.append(self.log_prob(part[:, k + 1], mean, std))
            rows.append(torch.stack(columns, dim=1))
        return torch.cat(rows)

    def train(
        self,
        latents: torch.Tensor,
        prompts: Sequence[str],
        times: Sequence[int],
        eta: float,
        old: torch.Tensor,
        advantage: torch.Tensor,
    ) -> None:
        """One pass over the samples in order, an optimiser update each ``samples /
        updates_per_round``."""
        samples, clip = len(latents), self.algorithm.clip_range
        per_update = samples // self.settings.updates_per_round
        parts = per_update // self.train_batch * len(times)
        for start in range(0, samples, self.train_batch):
            rows = slice(start, start + self.train_batch)
            embeds = self.embed(prompts[rows])
            for k, t in enumerate(times):
                mean, std = self.step(latents[rows, k], t, embeds, eta)
                ratio = torch.exp(self.log_prob(latents[rows, k + 1], mean, std) - old[rows, k])
                a = advantage[rows]
                loss = (
                    torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)).mean() / parts
                )
                loss.backward()
            if (start + self.train_batch) % per_update == 0:
                torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.settings.max_grad_norm)
                self.optimiser.step()
                self.optimiser.zero_grad()
