"""Latents as tokens, against FLUX's pipeline."""

from __future__ import annotations

import torch

from rlalign.networks.pipelines.packing import pack, positions, unpack


def test_tokens_are_those_of_the_pipeline() -> None:
    """Packed, and where each token lies; and back."""
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 8)
    wanted = FluxPipeline._pack_latents(x, 2, 4, 6, 8)
    assert torch.equal(pack(x), wanted)
    assert torch.equal(unpack(wanted, x.shape), x)
    places = FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    assert torch.equal(positions(x), places)
