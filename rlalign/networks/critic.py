"""A value network over denoising steps: V(x_t, t, c), a baseline for policy gradients."""

from __future__ import annotations

import itertools

import torch

from rlalign.diffusion.noise import generator

_WIDTH = 256
_DEPTH = 3


class ValueNetwork(torch.nn.Module):
    """An MLP on the flattened latent and the caption's mean embedding, with a gain per layer and
    denoising step.

    The network of DPOK's published experiments (Fan 2023, arXiv:2305.16381, appendix). Its weights
    depend on ``seed`` alone.
    """

    def __init__(self, *, elements: int, caption_width: int, steps: int, seed: int) -> None:
        super().__init__()
        widths = [elements + caption_width, *[_WIDTH] * _DEPTH]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator("critic", seed).integers(2**31)))
            self.layers = torch.nn.ModuleList(
                torch.nn.Linear(i, o) for i, o in itertools.pairwise(widths)
            )
            self.head = torch.nn.Linear(_WIDTH, 1)
        self.gains = torch.nn.Parameter(torch.ones(_DEPTH, steps, _WIDTH))

        # before the first update the value is 0, whatever it sees
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(
        self, x: torch.Tensor, step_B: torch.Tensor, summary_BD: torch.Tensor
    ) -> torch.Tensor:
        """(B,) values of latents (B, *latent) before denoising step ``step_B`` (int64), under words
        with this summary."""
        features = torch.cat([x.flatten(1), summary_BD], dim=1).to(self.head.weight.dtype)
        for layer, gains in zip(self.layers, self.gains, strict=True):
            features = torch.nn.functional.softplus(gains[step_B] * layer(features))
        return self.head(features)[:, 0]
