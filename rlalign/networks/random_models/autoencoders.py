"""Autoencoders that several families share; latents of a small one have four channels."""

from __future__ import annotations

from rlalign.networks.random_models.records import Network

_TINY_KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}
KL = Network(
    kind="AutoencoderKL",
    same={"scaling_factor": 0.18215},
    tiny=_TINY_KL,
    published={
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    },
)
KL_2 = KL.vary(published={"sample_size": 768})
KL_XL = KL.vary(same={"scaling_factor": 0.13025}, published={"sample_size": 1024})
_KL_16 = KL.vary(
    same={"use_quant_conv": False, "use_post_quant_conv": False},
    published={"sample_size": 1024, "latent_channels": 16},
)
KL_SD3 = _KL_16.vary(same={"scaling_factor": 1.5305, "shift_factor": 0.0609})
KL_FLUX = _KL_16.vary(same={"scaling_factor": 0.3611, "shift_factor": 0.1159})

# published sizes are the class's own defaults
KL_FLUX_2 = Network(kind="AutoencoderKLFlux2", tiny=_TINY_KL)
_STATISTICS = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [1.5, 2.0, 1.0, 0.7]}
KL_QWEN = Network(
    kind="AutoencoderKLQwenImage",
    tiny={
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False],
        **_STATISTICS,
    },
)
KL_WAN = Network(
    kind="AutoencoderKLWan",
    tiny={
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 4,
        **_STATISTICS,
    },
)

# pixels of 2 x 2 are its first layer's channels
KL_WAN_22 = KL_WAN.vary(
    same={"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2},
    tiny={"decoder_base_dim": 4, "scale_factor_spatial": 8},
    published={
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
)

_DC_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
DC_SANA = Network(
    kind="AutoencoderDC",
    same={
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.41407,
    },
    tiny={
        "latent_channels": 4,
        "attention_head_dim": 2,
        "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
        "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "encoder_qkv_multiscales": [[], [5]],
        "decoder_qkv_multiscales": [[], [5]],
        "encoder_layers_per_block": [1, 1],
        "decoder_layers_per_block": [1, 1],
    },
    published={"encoder_block_types": _DC_BLOCKS, "decoder_block_types": _DC_BLOCKS},
)
