"""Text encoders that several families share. Sizes as published; the ids of special tokens are
those of our tokenizers."""

from __future__ import annotations

from rlalign.networks.random_models.records import Network
from rlalign.networks.random_models.tokenizers import VOCABULARY

CLIP_L = Network(
    kind="CLIPTextModel",
    library="transformers",
    same={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    tiny={
        "vocab_size": VOCABULARY["clip"],
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "projection_dim": 16,
    },
    published={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
    },
)
CLIP_L_PROJECTED = CLIP_L.vary(kind="CLIPTextModelWithProjection")
# OpenCLIP's two, whose last layer the published files of SD 2 leave out
CLIP_H = CLIP_L.vary(
    same={"hidden_act": "gelu"},
    published={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "projection_dim": 512,
    },
)
CLIP_G = CLIP_L_PROJECTED.vary(
    same={"hidden_act": "gelu"},
    published={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
)
CLIP_H_PICTURES = Network(
    kind="CLIPVisionModel",
    library="transformers",
    same={"image_size": 224},
    tiny={
        "patch_size": 56,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
    },
    published={
        "patch_size": 14,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
)

T5_XXL = Network(
    kind="T5EncoderModel",
    library="transformers",
    same={"feed_forward_proj": "gated-gelu"},
    tiny={
        "vocab_size": VOCABULARY["t5"],
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    },
    published={
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
    },
)
UMT5_XXL = T5_XXL.vary(kind="UMT5EncoderModel", published={"vocab_size": 256384})

GEMMA_2_2B = Network(
    kind="Gemma2Model",
    library="transformers",
    tiny={
        "vocab_size": VOCABULARY["gemma"],
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 8192,
    },
    published={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    },
)

LLAMA_3_8B = Network(
    kind="LlamaModel",
    library="transformers",
    same={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    tiny={
        "vocab_size": VOCABULARY["llama"],
        "hidden_size": 16,
        "intermediate_size": 16,
        # HunyuanVideo reads the third hidden state from the end
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
    published={
        "vocab_size": 128320,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
    },
)

_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY["qwen"],
}

QWEN_3_4B = Network(
    kind="Qwen3Model",
    library="transformers",
    same={"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": True},
    tiny={**_SMALL, "head_dim": 8, "max_position_embeddings": 512},
    published={
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
    },
)

QWEN_25_VL_7B = Network(
    kind="Qwen2_5_VLForConditionalGeneration",
    library="transformers",
    same={"tie_word_embeddings": False},
    tiny={
        "text_config": {
            **_SMALL,
            "max_position_embeddings": 2048,
            "rope_scaling": {
                "mrope_section": [1, 1, 2],
                "rope_type": "default",
                "type": "default",
            },
            "rope_theta": 1e6,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
    },
    published={
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rope_scaling": {
                "mrope_section": [16, 24, 24],
                "rope_type": "default",
                "type": "default",
            },
            "rope_theta": 1e6,
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
)

MISTRAL_SMALL_24B = Network(
    kind="Mistral3ForConditionalGeneration",
    library="transformers",
    same={
        "vision_feature_layer": -1,
        "image_token_index": VOCABULARY["qwen"] - 1,
        "tie_word_embeddings": False,
    },
    tiny={
        "text_config": {
            **_SMALL,
            "model_type": "mistral",
            # FLUX.2 reads the hidden states 10, 20 and 30
            "num_hidden_layers": 31,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "sliding_window": None,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 12,
            "patch_size": 6,
            "num_channels": 3,
        },
    },
    published={
        "text_config": {
            "model_type": "mistral",
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 131072,
            "max_position_embeddings": 131072,
            "rope_theta": 1e9,
            "sliding_window": None,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "image_size": 1540,
            "patch_size": 14,
            "num_channels": 3,
        },
    },
)
