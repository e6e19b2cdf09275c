"""UNets on a variance-preserving path: Stable Diffusion 1 and 2, SDXL."""

from __future__ import annotations

from dataclasses import replace

from rlalign.networks.random_models import autoencoders, encoders
from rlalign.networks.random_models.records import Family, Network, Scheduler
from rlalign.networks.random_models.tokenizers import CLIP, CLIP_PAD

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_WITHOUT_CHECKER = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
_UNET = Network(
    kind="UNet2DConditionModel",
    tiny={
        "sample_size": 8,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    },
    published={"sample_size": 64, "cross_attention_dim": 768},
)
STABLE_DIFFUSION = Family(
    title="Stable Diffusion 1.5",
    pipeline="StableDiffusionPipeline",
    networks={"unet": _UNET, "vae": autoencoders.KL, "text_encoder": encoders.CLIP_L},
    tokenizers={"tokenizer": CLIP},
    scheduler=Scheduler(
        kind="PNDMScheduler",
        settings={
            **_BETAS,
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    ),
    facts=_WITHOUT_CHECKER,
)
STABLE_DIFFUSION_2 = replace(
    STABLE_DIFFUSION,
    title="Stable Diffusion 2.1",
    networks={
        "unet": _UNET.vary(
            same={"use_linear_projection": True},
            tiny={"attention_head_dim": [2, 4]},
            published={
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": [5, 10, 20, 20],
            },
        ),
        "vae": autoencoders.KL_2,
        "text_encoder": encoders.CLIP_H,
    },
    tokenizers={"tokenizer": CLIP_PAD},
    scheduler=Scheduler(
        kind="DDIMScheduler",
        settings={
            **_BETAS,
            "prediction_type": "v_prediction",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
    ),
)
SDXL = Family(
    title="SDXL base 1.0",
    pipeline="StableDiffusionXLPipeline",
    networks={
        "unet": Network(
            kind="UNet2DConditionModel",
            same={"use_linear_projection": True, "addition_embed_type": "text_time"},
            tiny={
                "sample_size": 8,
                "block_out_channels": [8, 16],
                "layers_per_block": 1,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                "attention_head_dim": [1, 2],
                "transformer_layers_per_block": [1, 2],
                "addition_time_embed_dim": 8,
                # six sizes of eight, and the pooled prompt
                "projection_class_embeddings_input_dim": 6 * 8 + 16,
                "cross_attention_dim": 32,
                "norm_num_groups": 4,
            },
            published={
                "sample_size": 128,
                "block_out_channels": [320, 640, 1280],
                "down_block_types": [
                    "DownBlock2D",
                    "CrossAttnDownBlock2D",
                    "CrossAttnDownBlock2D",
                ],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "attention_head_dim": [5, 10, 20],
                "transformer_layers_per_block": [1, 2, 10],
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 6 * 256 + 1280,
                "cross_attention_dim": 2048,
            },
        ),
        "vae": autoencoders.KL_XL,
        "text_encoder": encoders.CLIP_L,
        "text_encoder_2": encoders.CLIP_G,
    },
    tokenizers={"tokenizer": CLIP, "tokenizer_2": CLIP_PAD},
    scheduler=Scheduler(
        kind="EulerDiscreteScheduler",
        settings={**_BETAS, "timestep_spacing": "leading", "steps_offset": 1},
    ),
    facts={"force_zeros_for_empty_prompt": True, "add_watermarker": False},
)
