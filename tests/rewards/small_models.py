"""Small models of the published rewards' own classes, with random weights, written as their files
are."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlalign.networks.towers import build_towers


def save_clip(folder: Path) -> Path:
    """An open_clip file of the tiny architecture."""
    file = folder / "open_clip_model.safetensors"
    save_file(
        {n: t.contiguous() for n, t in build_towers("tiny", seed=3).clip.state_dict().items()}, file
    )
    return file


def save_head(folder: Path, widths: tuple[int, ...]) -> Path:
    """The aesthetic head's five layers of these widths."""
    torch.manual_seed(0)
    sizes = itertools.pairwise(widths)
    tensors = {}
    for place, (wide, narrow) in zip((0, 2, 4, 6, 7), sizes, strict=True):
        layer = torch.nn.Linear(wide, narrow)
        tensors |= {
            f"layers.{place}.weight": layer.weight.detach(),
            f"layers.{place}.bias": layer.bias.detach(),
        }
    save_file(tensors, folder / "head.safetensors")
    return folder / "head.safetensors"


def save_pickscore(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A CLIP of transformers, its tokenizer, and the settings that name their folders."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    from rlalign.policies.tiny import ASSET

    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            "vocab_size": 600,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
        },
        vision_config={
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        projection_dim=8,
    )
    tokenizer = CLIPTokenizer.from_pretrained(ASSET / "tokenizer")
    text: Any = config.text_config
    text.vocab_size = len(tokenizer)
    text.eos_token_id = tokenizer.eos_token_id
    model = CLIPModel(config).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "words")
    settings = {
        "name": "pickscore",
        "path": str(folder / "model"),
        "tokenizer": str(folder / "words"),
    }
    return model, tokenizer, settings


class PublishedImageReward(torch.nn.Module):
    """ImageReward's network from timm's vision transformer and BERT, whose names of tensors are
    those of the checkpoint."""

    def __init__(self, vocabulary: int) -> None:
        from timm.models.vision_transformer import VisionTransformer
        from transformers import BertConfig, BertModel

        super().__init__()
        self.blip: Any = torch.nn.Module()
        self.blip.visual_encoder = VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=128,
            depth=2,
            num_heads=2,
            num_classes=0,
            global_pool="",
        )
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=192,
            max_position_embeddings=40,
            is_decoder=True,
            add_cross_attention=True,
        )
        self.blip.text_encoder = BertModel(config, add_pooling_layer=False)
        self.blip.vision_proj = torch.nn.Linear(128, 16)
        self.mlp: Any = torch.nn.Module()
        widths = (128, 24, 16, 8, 6, 1)
        linear = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        drops = [torch.nn.Dropout(0.2) for _ in range(3)]
        self.mlp.layers = torch.nn.Sequential(
            linear[0], drops[0], linear[1], drops[1], linear[2], drops[2], linear[3], linear[4]
        )
        for (
            name,
            tensor,
        ) in (
            self.named_parameters()
        ):  # so that every tensor, and each one's place, shows in the score
            usual = (
                1.0
                if name.lower().endswith(("norm.weight", "norm1.weight", "norm2.weight"))
                else 0.0
            )
            torch.nn.init.normal_(tensor, mean=usual, std=0.5 if name.startswith("mlp.") else 0.2)
        torch.nn.init.zeros_(
            self.blip.text_encoder.embeddings.token_type_embeddings.weight
        )  # BLIP has none

    def forward(self, pixels: torch.Tensor, tokens: Any) -> torch.Tensor:
        seen = self.blip.visual_encoder(pixels)
        attends = tokens.attention_mask[
            :, None, None, :
        ].bool()  # four dimensions: taken as it is, not made causal
        length = attends.shape[-1]
        hidden = self.blip.text_encoder(
            tokens.input_ids,
            attention_mask=attends.expand(-1, 1, length, -1),
            encoder_hidden_states=seen,
        ).last_hidden_state
        return (self.mlp.layers(hidden[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


def checkpoint_of(model: PublishedImageReward) -> dict[str, torch.Tensor]:
    return {n: t.contiguous() for n, t in model.state_dict().items() if "token_type" not in n}


def save_imagereward(folder: Path) -> tuple[PublishedImageReward, Any, dict[str, Any]]:
    """The network, its tokenizer, and the settings that name their files."""
    from transformers import BertTokenizer

    letters = list("abcdefghijklmnopqrstuvwxyz")
    listed = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{c}" for c in letters),
        "red",
        "circle",
    ]
    (folder / "vocab.txt").write_text("\n".join(listed) + "\n")
    words = BertTokenizer(str(folder / "vocab.txt"))
    words.save_pretrained(folder / "words")
    torch.manual_seed(5)
    model = PublishedImageReward(len(words)).eval()
    save_file(checkpoint_of(model), folder / "ImageReward.safetensors")
    settings = {"name": "imagereward", "weights": str(folder / "ImageReward.safetensors")}
    return model, words, {**settings, "tokenizer": str(folder / "words")}
