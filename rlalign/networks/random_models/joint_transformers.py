"""Flow models whose attention joins the words and the picture: Stable Diffusion 3 and 3.5, FLUX,
Qwen-Image, Z-Image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlalign.networks.random_models import autoencoders, encoders
from rlalign.networks.random_models.records import Family, Network, Scheduler, Tokenizer
from rlalign.networks.random_models.tokenizers import CLIP, CLIP_PAD


def _euler(**settings: Any) -> Scheduler:
    return Scheduler(kind="FlowMatchEulerDiscreteScheduler", settings=settings)


# Stable Diffusion 3 and 3.5

_SD3 = Network(
    kind="SD3Transformer2DModel",
    tiny={
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "caption_projection_dim": 16,
        # the two pooled prompts
        "pooled_projection_dim": 16 + 16,
        "pos_embed_max_size": 12,
    },
    published={
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
)
SD3 = Family(
    title="Stable Diffusion 3 medium",
    pipeline="StableDiffusion3Pipeline",
    networks={
        "transformer": _SD3,
        "vae": autoencoders.KL_SD3,
        "text_encoder": encoders.CLIP_L_PROJECTED,
        "text_encoder_2": encoders.CLIP_G,
        "text_encoder_3": encoders.T5_XXL.vary(tiny={"d_model": 40}),
    },
    tokenizers={
        "tokenizer": CLIP,
        "tokenizer_2": CLIP_PAD,
        "tokenizer_3": Tokenizer(kind="t5", length=512),
    },
    scheduler=_euler(shift=3.0),
)
SD35 = replace(
    SD3,
    title="Stable Diffusion 3.5 medium",
    networks={
        **SD3.networks,
        "transformer": _SD3.vary(
            same={"qk_norm": "rms_norm"},
            tiny={"dual_attention_layers": [0]},
            published={"pos_embed_max_size": 384, "dual_attention_layers": list(range(13))},
        ),
    },
)
SD35_LARGE = replace(
    SD3,
    title="Stable Diffusion 3.5 large",
    networks={
        **SD3.networks,
        "transformer": _SD3.vary(
            same={"qk_norm": "rms_norm"},
            published={
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
            },
        ),
    },
)

# FLUX.1 and FLUX.2

_SMALL = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
}
_FLUX = Network(
    kind="FluxTransformer2DModel",
    same={"guidance_embeds": True},
    tiny={
        **_SMALL,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "axes_dims_rope": [4, 4, 8],
    },
)
_GROWING = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
FLUX = Family(
    title="FLUX.1-dev",
    pipeline="FluxPipeline",
    networks={
        "transformer": _FLUX,
        "vae": autoencoders.KL_FLUX,
        "text_encoder": encoders.CLIP_L,
        "text_encoder_2": encoders.T5_XXL,
    },
    tokenizers={
        "tokenizer": CLIP,
        "tokenizer_2": Tokenizer(kind="t5", length=512),
    },
    scheduler=_euler(**_GROWING),
)
FLUX_SCHNELL = replace(
    FLUX,
    title="FLUX.1-schnell",
    networks={**FLUX.networks, "transformer": _FLUX.vary(same={"guidance_embeds": False})},
    scheduler=_euler(**{**_GROWING, "use_dynamic_shifting": False, "shift": 1.0}),
)

_FLUX_2 = Network(
    kind="Flux2Transformer2DModel",
    same={"guidance_embeds": True},
    tiny={
        **_SMALL,
        # three hidden states of the text encoder
        "joint_attention_dim": 3 * 16,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": [4, 4, 4, 4],
    },
)
FLUX_2 = Family(
    title="FLUX.2-dev",
    pipeline="Flux2Pipeline",
    networks={
        "transformer": _FLUX_2,
        "vae": autoencoders.KL_FLUX_2,
        "text_encoder": encoders.MISTRAL_SMALL_24B,
    },
    tokenizers={"tokenizer": Tokenizer(kind="qwen", length=512)},
    scheduler=_euler(**_GROWING),
)
FLUX_2_KLEIN = Family(
    title="FLUX.2-klein base 4B",
    pipeline="Flux2KleinPipeline",
    networks={
        "transformer": _FLUX_2.vary(
            same={"guidance_embeds": False},
            published={
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 3 * 2560,
            },
        ),
        "vae": autoencoders.KL_FLUX_2,
        # it reads the hidden states 9, 18 and 27
        "text_encoder": encoders.QWEN_3_4B.vary(
            kind="Qwen3ForCausalLM", tiny={"num_hidden_layers": 28}
        ),
    },
    tokenizers={"tokenizer": Tokenizer(kind="qwen", length=512)},
    scheduler=_euler(**_GROWING),
    facts={"is_distilled": False},
)
FLUX_2_KLEIN_DISTILLED = replace(
    FLUX_2_KLEIN, title="FLUX.2-klein 4B, distilled", facts={"is_distilled": True}
)

# Qwen-Image, Z-Image

QWEN_IMAGE = Family(
    title="Qwen-Image",
    pipeline="QwenImagePipeline",
    networks={
        "transformer": Network(
            kind="QwenImageTransformer2DModel",
            tiny={
                "in_channels": 16,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 16,
                "axes_dims_rope": [8, 4, 4],
            },
        ),
        "vae": autoencoders.KL_QWEN,
        "text_encoder": encoders.QWEN_25_VL_7B,
    },
    tokenizers={"tokenizer": Tokenizer(kind="qwen", length=131072)},
    scheduler=_euler(
        use_dynamic_shifting=True,
        shift=1.0,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    ),
)
Z_IMAGE = Family(
    title="Z-Image",
    pipeline="ZImagePipeline",
    networks={
        "transformer": Network(
            kind="ZImageTransformer2DModel",
            tiny={
                "in_channels": 4,
                "dim": 32,
                "n_layers": 2,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": 16,
                "axes_dims": [8, 4, 4],
                "axes_lens": [256, 32, 32],
            },
        ),
        "vae": autoencoders.KL_FLUX,
        "text_encoder": encoders.QWEN_3_4B,
    },
    tokenizers={"tokenizer": Tokenizer(kind="qwen", length=131072)},
    scheduler=_euler(shift=3.0),
)
