"""Latents as tokens of 2 x 2, and the places of tokens: how FLUX's and Qwen-Image's transformers
take pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack(x_BCHW: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, H, W) of even sides -> tokens (B, H W / 4, 4 C), row by row."""
    rows, channels, height, width = x_BCHW.shape
    blocks = x_BCHW.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(rows, height * width // 4, 4 * channels)


def unpack(tokens_BND: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of ``pack`` for latents of ``shape`` (B, C, H, W)."""
    rows, channels, height, width = shape
    blocks = tokens_BND.reshape(rows, height // 2, width // 2, channels, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height, width)


def positions(x_BCHW: torch.Tensor) -> torch.Tensor:
    """(N, 3) float32 places (0, y, x) of the tokens that ``pack`` makes."""
    height, width = (side // 2 for side in x_BCHW.shape[-2:])
    y_N, x_N = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(y_N), y_N, x_N], dim=-1)
    return places.reshape(-1, 3).to(x_BCHW.device, torch.float32)


def places(height: int, width: int, length: int, *, device: torch.device) -> torch.Tensor:
    """(height width length, 4) places (0, y, x, l) of whole numbers: FLUX.2's, of a picture's
    tokens (length 1) or of a text's (height and width 1)."""
    sides = (torch.arange(side, device=device) for side in (1, height, width, length))
    return torch.cartesian_prod(*sides)
