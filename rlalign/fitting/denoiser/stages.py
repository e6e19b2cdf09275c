"""The two stages: their losses, the standardised latents between them, and one network in
training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlalign.core.finite import refuse
from rlalign.diffusion.noise import generator, normal
from rlalign.diffusion.paths import NoisePath, VariancePreserving, coefficients
from rlalign.diffusion.predictions import PredictionType, target
from rlalign.fitting.checkpoints import (
    optimizer_state,
    own_part,
    refuse_gradient,
    restore_optimizer,
)
from rlalign.fitting.denoiser.settings import Optimisation, Pretrain


def denoising_loss(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    clean_BCHW: torch.Tensor,
    noise_BCHW: torch.Tensor,
    level_B: torch.Tensor,
    path: NoisePath,
    kind: PredictionType,
) -> torch.Tensor:
    """Mean squared error of ``predict(x, timestep)`` against the target of ``kind`` at x = alpha *
    clean + sigma * noise.

    With a variance-preserving path and "epsilon" it is the simple loss of Ho 2020
    (arXiv:2006.11239, eq. 14); with rectified flow and "flow" it is flow matching (Lipman 2022,
    arXiv:2210.02747).
    """
    alpha, sigma = coefficients(path, level_B, clean_BCHW)
    output_BCHW = predict(alpha * clean_BCHW + sigma * noise_BCHW, path.timestep(level_B))
    return torch.nn.functional.mse_loss(
        output_BCHW, target(clean_BCHW, noise_BCHW, alpha, sigma, kind)
    )


def _to_network(pictures_NCHW: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pictures_NCHW.float() / 127.5 - 1.0


def autoencoder_loss(
    vae: Any, pictures_NCHW: torch.Tensor, config: Pretrain
) -> Callable[[int], torch.Tensor]:
    """Update -> L1 + L2 of the reconstruction + KL of the posterior (Rombach 2021,
    arXiv:2112.10752, without its adversary), on the update's own batch and noise."""
    settings = config.autoencoder

    def loss(update: int) -> torch.Tensor:
        key = ("pretrain", config.seed, "autoencoder", update)
        rows_B = generator(*key, "rows").integers(len(pictures_NCHW), size=settings.batch)
        pixels_BCHW = _to_network(pictures_NCHW[torch.from_numpy(rows_B)])
        posterior = vae.encode(pixels_BCHW).latent_dist
        latents_BCHW = posterior.mean + posterior.std * normal(
            (*key, "noise"), posterior.mean.shape
        )
        error_BCHW = vae.decode(latents_BCHW).sample - pixels_BCHW
        kl = posterior.kl().mean() / latents_BCHW[0].numel()
        return error_BCHW.abs().mean() + error_BCHW.square().mean() + settings.kl * kl

    return loss


@torch.no_grad()
def standardise(vae: Any, pictures_NCHW: torch.Tensor) -> torch.Tensor:
    """Gives every latent channel mean 0 and standard deviation 1, and returns the latents of all
    pictures.

    The affine map is folded exactly into the 1x1 convolutions on both sides of the latents, z -> (z
    - mean) / std into ``quant_conv`` and its inverse into ``post_quant_conv``: a pipeline has a
    single ``scaling_factor``, and it may stay 1.
    """
    latents_NCHW = encode_all(vae, pictures_NCHW)
    mean_C = latents_NCHW.mean(dim=(0, 2, 3))
    std_C = latents_NCHW.std(dim=(0, 2, 3))
    channels = len(mean_C)
    into = vae.quant_conv
    out_of = vae.post_quant_conv
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean_C
    out_of.weight *= std_C[None, :, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean_C) / std_C
    into.weight[:channels] /= std_C[:, None, None, None]
    # the posterior's log-variance moves along
    into.bias[channels:] -= 2.0 * std_C.log()
    # again, since what the folded network gives is rounded otherwise than (z - mean) / std
    return encode_all(vae, pictures_NCHW)


@torch.no_grad()
def encode_all(vae: Any, pictures_NCHW: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) latents of uint8 pictures: the mean of the encoder's posterior."""
    latents_NCHW = torch.cat(
        [vae.encode(_to_network(part)).latent_dist.mean for part in pictures_NCHW.split(256)]
    )
    refuse(
        latents_NCHW,
        "the autoencoder (its encoder)",
        "take another autoencoder.source, or a lower autoencoder.lr",
    )
    return latents_NCHW


def denoiser_loss(
    network: torch.nn.ModuleDict,
    latents_NCHW: torch.Tensor,
    tokens_NL: torch.Tensor,
    empty_1L: torch.Tensor,
    path: VariancePreserving,
    config: Pretrain,
) -> Callable[[int], torch.Tensor]:
    """Update -> denoising loss on the update's own batch, noise, levels and dropped captions.

    ``network`` holds "unet" and "text_encoder"; gradients reach both.
    """
    unet = network["unet"]
    text = network["text_encoder"]

    def loss(update: int) -> torch.Tensor:
        # which latents, at which levels, and whose captions are dropped
        settings = config.denoiser
        key = ("pretrain", config.seed, "denoiser", update)
        rng = generator(*key, "rows")
        rows_B = torch.from_numpy(rng.integers(len(latents_NCHW), size=settings.batch))
        level_B = torch.from_numpy(rng.integers(path.train_steps, size=settings.batch))
        dropped_B1 = torch.from_numpy(rng.random(settings.batch) < settings.caption_dropout)[
            :, None
        ]

        # what the UNet is told, and how it is asked
        embeds_BLD = text(torch.where(dropped_B1, empty_1L, tokens_NL[rows_B])).last_hidden_state
        clean_BCHW = latents_NCHW[rows_B]

        def predict(x_BCHW: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
            return unet(x_BCHW, timestep_B, embeds_BLD).sample

        return denoising_loss(
            predict, clean_BCHW, normal((*key, "noise"), clean_BCHW.shape), level_B, path, "epsilon"
        )

    return loss


class Stage:
    """One network, its optimiser, and the moving average of its weights."""

    def __init__(
        self,
        name: str,
        network: torch.nn.Module,
        settings: Optimisation,
        saved: dict[str, torch.Tensor],
    ) -> None:
        self.name = name
        self.network = network.train()
        self.settings = settings
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=0.0)
        self.average = {n: p.detach().clone() for n, p in network.named_parameters()}
        self.done = 0
        own = own_part(saved, name)
        if own:
            self._restore(own)

    def step(self, loss: torch.Tensor) -> None:
        """One optimiser update and one of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * min(1.0, (self.done + 1) / (self.settings.warmup + 1))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        refuse_gradient(norm, self.name, self.done)
        self.optimizer.step()
        # a young average must forget the first weights faster than an old one
        decay = min(self.settings.ema_decay, (1 + self.done) / (10 + self.done))
        for name, parameter in self.network.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1.0 - decay)
        self.done += 1

    @torch.no_grad()
    def keep_average(self) -> None:
        """Ends the stage: the network takes over the averaged weights and stays as it is."""
        for name, parameter in self.network.named_parameters():
            parameter.copy_(self.average[name])
        self.network.eval().requires_grad_(False)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of everything that going on needs, under ``NAME/``."""
        state = {f"network/{n}": p for n, p in self.network.named_parameters()}
        state |= {f"average/{n}": p for n, p in self.average.items()}
        state |= optimizer_state(self.optimizer)
        state["done"] = torch.tensor(self.done)
        return {f"{self.name}/{key}": value.detach().clone() for key, value in state.items()}

    @torch.no_grad()
    def _restore(self, state: dict[str, torch.Tensor]) -> None:
        restore_optimizer(self.optimizer, state)
        for name, parameter in self.network.named_parameters():
            parameter.copy_(state[f"network/{name}"])
            self.average[name].copy_(state[f"average/{name}"])
        self.done = int(state["done"])
