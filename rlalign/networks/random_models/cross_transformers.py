"""Transformers that look at the words by cross-attention, and ship with a solver of several steps:
Sana, PixArt-Sigma, Wan 2.1 and 2.2."""

from __future__ import annotations

from dataclasses import replace

from rlalign.networks.random_models import autoencoders, encoders
from rlalign.networks.random_models.records import Family, Network, Scheduler, Tokenizer

SANA = Family(
    title="Sana 1.6B, 1024 px",
    pipeline="SanaPipeline",
    networks={
        "transformer": Network(
            kind="SanaTransformer2DModel",
            tiny={
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 1,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 8,
                "cross_attention_dim": 16,
                "caption_channels": 16,
                "sample_size": 8,
            },
        ),
        "vae": autoencoders.DC_SANA,
        "text_encoder": encoders.GEMMA_2_2B,
    },
    tokenizers={"tokenizer": Tokenizer(kind="gemma", length=8192)},
    scheduler=Scheduler(
        kind="DPMSolverMultistepScheduler",
        settings={
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
    ),
    pixels=32,
)
PIXART = Family(
    title="PixArt-Sigma XL 2, 1024 px",
    pipeline="PixArtSigmaPipeline",
    networks={
        "transformer": Network(
            kind="PixArtTransformer2DModel",
            same={"use_additional_conditions": False},
            tiny={
                "sample_size": 8,
                "num_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "caption_channels": 32,
                "cross_attention_dim": 16,
            },
            published={"caption_channels": 4096},
        ),
        "vae": autoencoders.KL_XL,
        "text_encoder": encoders.T5_XXL,
    },
    tokenizers={"tokenizer": Tokenizer(kind="t5", length=512)},
    scheduler=Scheduler(
        kind="DPMSolverMultistepScheduler",
        settings={"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    ),
)
_WAN = Network(
    kind="WanTransformer3DModel",
    tiny={
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "rope_max_seq_len": 32,
    },
    published={"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
)
WAN = Family(
    title="Wan 2.1 text to video 1.3B",
    pipeline="WanPipeline",
    networks={
        "transformer": _WAN,
        "vae": autoencoders.KL_WAN,
        "text_encoder": encoders.UMT5_XXL,
    },
    tokenizers={"tokenizer": Tokenizer(kind="t5", length=512)},
    scheduler=Scheduler(
        kind="UniPCMultistepScheduler",
        settings={
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
        },
    ),
    frames=5,
)
_WAN_14B = _WAN.vary(published={"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824})
WAN_22 = replace(
    WAN,
    title="Wan 2.2 text to video A14B",
    networks={**WAN.networks, "transformer": _WAN_14B, "transformer_2": _WAN_14B},
    facts={"boundary_ratio": 0.875},
)
# latents, a mask with a channel a frame, and the latents of a picture
_WAN_22_I2V = _WAN_14B.vary(tiny={"in_channels": 4 + 2 + 4}, published={"in_channels": 36})
WAN_22_I2V = replace(
    WAN_22,
    title="Wan 2.2 image to video A14B",
    pipeline="WanImageToVideoPipeline",
    networks={**WAN.networks, "transformer": _WAN_22_I2V, "transformer_2": _WAN_22_I2V},
    facts={"boundary_ratio": 0.9},
)
WAN_I2V = replace(
    WAN,
    title="Wan 2.1 image to video 14B",
    pipeline="WanImageToVideoPipeline",
    networks={
        **WAN.networks,
        "transformer": _WAN_22_I2V.vary(
            tiny={"image_dim": 16, "added_kv_proj_dim": 24},
            published={"image_dim": 1280, "added_kv_proj_dim": 5120},
        ),
        "image_encoder": encoders.CLIP_H_PICTURES,
    },
    tokenizers={**WAN.tokenizers, "image_processor": Tokenizer(kind="clip_pictures", length=224)},
)
WAN_22_5B = replace(
    WAN,
    title="Wan 2.2 text and image to video 5B",
    networks={
        **WAN.networks,
        "transformer": _WAN.vary(
            published={
                "in_channels": 48,
                "out_channels": 48,
                "num_attention_heads": 24,
                "ffn_dim": 14336,
            }
        ),
        "vae": autoencoders.KL_WAN_22,
    },
    scheduler=replace(WAN.scheduler, settings={**WAN.scheduler.settings, "flow_shift": 5.0}),
    facts={"expand_timesteps": True},
    pixels=32,
)
