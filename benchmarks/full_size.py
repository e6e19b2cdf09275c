"""Pipelines of published sizes with random weights, for benchmarks: no download, the same
arithmetic.

python benchmarks/full_size.py FOLDER    # writes the one of Stable Diffusion 1.5's size as a
pipeline folder (4.3 GB)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent.parent / "rlalign" / "assets"


def stable_diffusion_15(small: bool = False) -> Any:
    """A StableDiffusionPipeline with the UNet (860 M), decoder and text encoder of Stable Diffusion
    1.5."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    width = 32 if small else 768
    channels = (32, 32, 64, 64) if small else (320, 640, 1280, 1280)
    made: Any = StableDiffusionPipeline
    return made(
        unet=UNet2DConditionModel(
            sample_size=16 if small else 64,
            block_out_channels=channels,
            cross_attention_dim=width,
            attention_head_dim=8,
        ),
        vae=autoencoder(latent_channels=4, scaling_factor=0.18215, small=small),
        text_encoder=CLIPTextModel(words("tiny", width=width, layers=2 if small else 12)),
        tokenizer=tokenizer("tiny"),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(small: bool = False) -> Any:
    """A StableDiffusionXLPipeline with the UNet (2.6 B) of Stable Diffusion XL."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    widths = (32, 32) if small else (768, 1280)
    down: Any = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up: Any = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    made: Any = StableDiffusionXLPipeline
    network: Any = UNet2DConditionModel  # it says one number where one for each block does too
    return made(
        unet=network(
            sample_size=16 if small else 128,
            down_block_types=down,
            up_block_types=up,
            block_out_channels=(32, 64, 64) if small else (320, 640, 1280),
            transformer_layers_per_block=(1, 1, 2) if small else (1, 2, 10),
            attention_head_dim=(2, 4, 4) if small else (5, 10, 20),
            cross_attention_dim=sum(widths),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8 if small else 256,
            projection_class_embeddings_input_dim=widths[1] + 6 * (8 if small else 256),
        ),
        vae=autoencoder(latent_channels=4, scaling_factor=0.13025, small=small),
        text_encoder=CLIPTextModel(words("tiny", width=widths[0], layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(
            words("tiny", width=widths[1], layers=2, projection=widths[1])
        ),
        tokenizer=tokenizer("tiny"),
        tokenizer_2=tokenizer("tiny"),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    )


def stable_diffusion_3(small: bool = False) -> Any:
    """A StableDiffusion3Pipeline with the transformer (2.2 to 2.5 B) of Stable Diffusion 3.5
    medium, without T5.

    Its 77 word tokens are those of CLIP; the published pipeline has T5's 256 beside them.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    widths = (32, 32) if small else (768, 1280)
    layers, heads = (2, 2) if small else (24, 24)
    readers = [
        CLIPTextModelWithProjection(words("tiny_flow", width=w, layers=2, projection=w))
        for w in widths
    ]
    made: Any = StableDiffusion3Pipeline
    return made(
        transformer=SD3Transformer2DModel(
            sample_size=16 if small else 64,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=layers,
            attention_head_dim=16 if small else 64,
            num_attention_heads=heads,
            caption_projection_dim=heads * (16 if small else 64),
            joint_attention_dim=64 if small else 4096,
            pooled_projection_dim=sum(widths),
            pos_embed_max_size=16 if small else 384,
            qk_norm="rms_norm",
            dual_attention_layers=() if small else tuple(range(13)),
        ),
        vae=autoencoder(
            latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, small=small
        ),
        text_encoder=readers[0],
        text_encoder_2=readers[1],
        text_encoder_3=None,
        tokenizer=tokenizer("tiny_flow"),
        tokenizer_2=tokenizer("tiny_flow", "tokenizer_2"),
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def autoencoder(
    *, latent_channels: int, scaling_factor: float, shift_factor: float | None = None, small: bool
) -> Any:
    """The autoencoder that both families have, with their latents."""
    from diffusers import AutoencoderKL

    channels: Any = (32, 32, 32, 32) if small else (128, 256, 512, 512)
    down: Any = ("DownEncoderBlock2D",) * 4
    up: Any = ("UpDecoderBlock2D",) * 4
    return AutoencoderKL(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=latent_channels,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def words(asset: str, *, width: int, layers: int, projection: int = 512) -> Any:
    """A CLIP text encoder's configuration over the vocabulary that ships."""
    from transformers import CLIPTextConfig

    read = tokenizer(asset)
    return CLIPTextConfig(
        vocab_size=len(read),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=77,
        projection_dim=projection,
        bos_token_id=read.bos_token_id,
        eos_token_id=read.eos_token_id,
        pad_token_id=read.pad_token_id,
    )


def tokenizer(asset: str, part: str = "tokenizer") -> Any:
    """The shipped tokenizer, padded to CLIP's 77 tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / asset / part, model_max_length=77)


if __name__ == "__main__":
    import torch

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipeline = stable_diffusion_15(small="--small" in sys.argv)
    pipeline.save_pretrained(sys.argv[1], safe_serialization=True)
