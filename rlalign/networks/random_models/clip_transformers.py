"""Transformers of clips with autoencoders of their own: LTX-Video, HunyuanVideo, CogVideoX."""

from __future__ import annotations

from dataclasses import replace

from rlalign.networks.random_models import encoders
from rlalign.networks.random_models.records import Family, Network, Scheduler, Tokenizer
from rlalign.networks.random_models.tokenizers import CLIP

# LTX-Video

_LTX_VAE = Network(
    kind="AutoencoderKLLTXVideo",
    tiny={
        "latent_channels": 4,
        "block_out_channels": [8, 8, 8, 8],
        "decoder_block_out_channels": [8, 8, 8, 8],
        "layers_per_block": [1] * 5,
        "decoder_layers_per_block": [1] * 5,
    },
)
LTX = Family(
    title="LTX-Video 0.9.0, 2B",
    pipeline="LTXPipeline",
    networks={
        "transformer": Network(
            kind="LTXVideoTransformer3DModel",
            tiny={
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "cross_attention_dim": 16,
                "num_layers": 2,
                "caption_channels": 32,
            },
        ),
        "vae": _LTX_VAE,
        "text_encoder": encoders.T5_XXL,
    },
    tokenizers={"tokenizer": Tokenizer(kind="t5", length=128)},
    scheduler=Scheduler(
        kind="FlowMatchEulerDiscreteScheduler",
        settings={
            "use_dynamic_shifting": True,
            "base_shift": 0.95,
            "max_shift": 2.05,
            "base_image_seq_len": 1024,
            "max_image_seq_len": 4096,
            "shift_terminal": 0.1,
        },
    ),
    pixels=32,
    frames=9,
)
LTX_091 = replace(
    LTX,
    title="LTX-Video 0.9.1, 2B",
    networks={
        **LTX.networks,
        # told a timestep, and with noise of its own
        "vae": _LTX_VAE.vary(
            same={
                "decoder_spatio_temporal_scaling": [True] * 3,
                "decoder_inject_noise": [False, True, True, True],
                "upsample_residual": [True] * 3,
                "upsample_factor": [2] * 3,
                "timestep_conditioning": True,
            },
            tiny={
                "decoder_block_out_channels": [8, 16, 32],
                "decoder_layers_per_block": [1] * 4,
            },
            published={
                "decoder_block_out_channels": [256, 512, 1024],
                "decoder_layers_per_block": [5, 6, 7, 8],
            },
        ),
    },
)

# HunyuanVideo

HUNYUAN_VIDEO = Family(
    title="HunyuanVideo, text to video",
    pipeline="HunyuanVideoPipeline",
    networks={
        "transformer": Network(
            kind="HunyuanVideoTransformer3DModel",
            tiny={
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 10,
                "num_layers": 1,
                "num_single_layers": 1,
                "num_refiner_layers": 1,
                "text_embed_dim": 16,
                "pooled_projection_dim": 16,
                "rope_axes_dim": [2, 4, 4],
            },
        ),
        "vae": Network(
            kind="AutoencoderKLHunyuanVideo",
            same={"scaling_factor": 0.476986},
            tiny={
                "latent_channels": 4,
                "block_out_channels": [8, 8, 8, 8],
                "layers_per_block": 1,
                "norm_num_groups": 4,
            },
        ),
        "text_encoder": encoders.LLAMA_3_8B,
        "text_encoder_2": encoders.CLIP_L,
    },
    tokenizers={"tokenizer": Tokenizer(kind="llama", length=8192), "tokenizer_2": CLIP},
    scheduler=Scheduler(kind="FlowMatchEulerDiscreteScheduler", settings={"shift": 7.0}),
    pixels=32,
    frames=5,
)

# CogVideoX

_COGVIDEOX = Network(
    kind="CogVideoXTransformer3DModel",
    tiny={
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 9,
        "max_text_seq_length": 24,
    },
)
_COGVIDEOX_VAE = Network(
    kind="AutoencoderKLCogVideoX",
    same={"scaling_factor": 0.7},
    tiny={
        "down_block_types": ["CogVideoXDownBlock3D"] * 3,
        "up_block_types": ["CogVideoXUpBlock3D"] * 3,
        "block_out_channels": [8, 8, 8],
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
)
_COGVIDEOX_LEVELS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
COGVIDEOX_2B = Family(
    title="CogVideoX 2B",
    pipeline="CogVideoXPipeline",
    networks={
        "transformer": _COGVIDEOX,
        "vae": _COGVIDEOX_VAE.vary(same={"scaling_factor": 1.15258426}),
        "text_encoder": encoders.T5_XXL,
    },
    tokenizers={"tokenizer": Tokenizer(kind="t5", length=226)},
    scheduler=Scheduler(
        kind="CogVideoXDDIMScheduler",
        settings={**_COGVIDEOX_LEVELS, "snr_shift_scale": 3.0},
    ),
    frames=9,
)
_COGVIDEOX_5B = _COGVIDEOX.vary(
    same={"use_rotary_positional_embeddings": True},
    published={"num_attention_heads": 48, "num_layers": 42},
)
COGVIDEOX = replace(
    COGVIDEOX_2B,
    title="CogVideoX 5B",
    networks={
        "transformer": _COGVIDEOX_5B,
        "vae": _COGVIDEOX_VAE,
        "text_encoder": encoders.T5_XXL,
    },
    scheduler=Scheduler(
        kind="CogVideoXDDIMScheduler",
        settings={**_COGVIDEOX_LEVELS, "snr_shift_scale": 1.0},
    ),
)
COGVIDEOX_15 = replace(
    COGVIDEOX,
    title="CogVideoX 1.5 5B",
    networks={
        **COGVIDEOX.networks,
        # tokens two frames deep
        "transformer": _COGVIDEOX_5B.vary(
            same={"patch_size_t": 2, "patch_bias": False},
            tiny={"sample_height": 8, "sample_width": 8},
            published={"sample_height": 300, "sample_width": 300, "sample_frames": 81},
        ),
    },
)
