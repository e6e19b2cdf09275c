"""A small random Qwen2-VL with a processor of its own, as the rewards that are made of one read
it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def small_tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>"]
    special += ["<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = [*sorted(ByteLevel.alphabet()), *special]
    return Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[],
        unk_token=None,
        pad_token=special[0],
        eos_token=special[1],
        additional_special_tokens=special[2:],
    )


def save_base(folder: Path, pixels: int) -> Any:
    """Writes configuration and processor, which resizes pictures to about ``pixels``; gives the
    configuration."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = small_tokenizer()
    ids = {n: tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in ("image_pad", "video_pad")}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
    )
    config.save_pretrained(folder)
    size = {"shortest_edge": pixels, "longest_edge": pixels}
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return config


def build_model(config: Any, more_tokens: int) -> Any:
    """The whole model with random weights and ``more_tokens`` words more than the base."""
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    config.text_config.vocab_size += more_tokens
    model = Qwen2VLForConditionalGeneration(config).eval()
    for name, tensor in model.named_parameters():
        usual = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        torch.nn.init.normal_(tensor, mean=usual, std=0.3)
    return model


def old_names(model: Any) -> dict[str, torch.Tensor]:
    """Its tensors under the names of the layout in which the rewards were published."""
    found = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        found[name] = tensor.contiguous().clone()
    return found
