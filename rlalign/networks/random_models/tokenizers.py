"""Tokenizers that read letter by letter: the words of a published one cannot be made up, and
random weights know none.

Printable ASCII characters have a token each; other characters are unknown, but for Qwen's, which
reads bytes. A prompt takes more tokens than with the published vocabulary and is cut at the same
length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlalign.networks.random_models.records import Tokenizer

_CHARACTERS = [chr(code) for code in range(33, 127)]
_SPACE = "\u2581"
_CHAT = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
_HEADS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
VOCABULARY = {
    "clip": 2 + 2 * len(_CHARACTERS),
    "t5": 4 + len(_CHARACTERS),
    "gemma": 5 + len(_CHARACTERS),
    "llama": 5 + len(_CHARACTERS) + len(_HEADS),
    "qwen": 256 + len(_CHAT) + len(_VISION),
}
"""Kind -> how many tokens it has."""

CLIP = Tokenizer(kind="clip", length=77)
CLIP_PAD = replace(CLIP, pads_with="!")
"""OpenCLIP's, as diffusers' folders have it: it pads with an exclamation mark."""

_MESSAGE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML; a message's content is a string, or a list of texts."""


def make_tokenizer(spec: Tokenizer) -> Any:
    """A tokenizer of transformers, or its preparation of pictures."""
    if spec.kind == "clip_pictures":
        return _clip_pictures(spec.length)
    makers = {"clip": _clip, "t5": _t5, "qwen": _qwen, "gemma": _gemma, "llama": _llama}
    more: dict[str, Any] = {"model_max_length": spec.length}
    if spec.pads_with:
        more["pad_token"] = spec.pads_with
    return makers[spec.kind](more)


def _clip(more: dict[str, Any]) -> Any:
    from transformers import CLIPTokenizer

    # a letter within a word, and one that ends it
    words = ["<|startoftext|>", "<|endoftext|>", *_CHARACTERS, *(c + "</w>" for c in _CHARACTERS)]
    return CLIPTokenizer(vocab=_numbered(words), merges=[], **more)


def _clip_pictures(side: int) -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def _t5(more: dict[str, Any]) -> Any:
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", _SPACE, *_CHARACTERS]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, **more)


def _qwen(more: dict[str, Any]) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    # bytes are never unknown
    settings: dict[str, Any] = {
        "vocab": _numbered([*sorted(ByteLevel.alphabet()), *_CHAT, *_VISION]),
        "merges": [],
        "unk_token": None,
        "pad_token": _CHAT[0],
        "eos_token": _CHAT[1],
        "additional_special_tokens": [_CHAT[2], *_VISION],
        "chat_template": _MESSAGE,
    }
    return Qwen2Tokenizer(**settings, **more)


def _gemma(more: dict[str, Any]) -> Any:
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", _SPACE, *_CHARACTERS]
    return GemmaTokenizer(vocab=_numbered(pieces), merges=[], **more)


def _llama(more: dict[str, Any]) -> Any:
    from transformers import LlamaTokenizer

    # short prompts are filled up behind their end
    pieces = ["<unk>", "<s>", "</s>", "<pad>", _SPACE, *_CHARACTERS, *_HEADS]
    settings: dict[str, Any] = {
        "vocab": _numbered(pieces),
        "merges": [],
        "pad_token": "<pad>",
        "padding_side": "right",
        "additional_special_tokens": _HEADS,
    }
    return LlamaTokenizer(**settings, **more)


def _numbered(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}
