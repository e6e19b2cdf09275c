"""Latents as tokens, against FLUX's pipelines."""

from __future__ import annotations

import torch

from rlalign.networks.pipelines.packing import pack, places, positions, unpack


def test_tokens_are_those_of_the_pipeline() -> None:
    """Packed, and where each token lies; and back."""
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 8)
    wanted = FluxPipeline._pack_latents(x, 2, 4, 6, 8)
    assert torch.equal(pack(x), wanted)
    assert torch.equal(unpack(wanted, x.shape), x)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    assert torch.equal(positions(x), ids)


def test_places_are_those_of_flux2() -> None:
    """Of a picture of 3 x 4 tokens, and of a text of 5."""
    from diffusers import Flux2Pipeline

    device = torch.device("cpu")
    picture = Flux2Pipeline._prepare_latent_ids(torch.zeros(2, 1, 3, 4))
    text = Flux2Pipeline._prepare_text_ids(torch.zeros(2, 5, 1))
    assert torch.equal(places(3, 4, 1, device=device), picture[0])
    assert torch.equal(places(1, 1, 5, device=device), text[0])
