"""The published rewards on small models of the same classes: against the libraries' own forward passes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from rlalign.registry import UserError, build
from rlalign.rewards.aesthetic import read_head
from rlalign.towers import build_towers

PROMPTS = ["a red circle", "two blue squares above a white cross"]


@pytest.fixture(scope="module")
def media() -> torch.Tensor:
    return torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: Any) -> Path:
    """An open_clip file of the tiny architecture."""
    file = tmp_path_factory.mktemp("clip") / "open_clip_model.safetensors"
    save_file({n: t.contiguous() for n, t in build_towers("tiny", seed=3).clip.state_dict().items()}, file)
    return file


def _gradient_reaches(scorer: Any, media: torch.Tensor) -> None:
    wanted = media.clone().requires_grad_()
    scorer(wanted, PROMPTS).sum().backward()
    assert wanted.grad is not None
    assert float(wanted.grad.abs().max()) > 0


@pytest.mark.parametrize("name", ["clip", "hpsv2"])
def test_it_is_the_cosine_of_open_clips_own_vectors(name: str, media: torch.Tensor, weights: Path) -> None:
    settings = {"name": name, "architecture": "tiny", "weights": str(weights), "scale": 2.5}
    scorer = build("rewards", settings).load("cpu")  # type: ignore[attr-defined]
    towers = build_towers("tiny", pretrained=str(weights)).eval()
    with torch.no_grad():
        image, text, _ = towers.clip(towers.preprocess(media[:, 0]), towers.tokenizer(PROMPTS))[:3]
        torch.testing.assert_close(scorer(media, PROMPTS), 2.5 * (image * text).sum(-1), atol=1e-5, rtol=1e-5)
    _gradient_reaches(scorer, media)


def test_hpsv2_pads_the_shorter_side_and_clip_cuts_the_longer(weights: Path) -> None:
    wide = torch.rand(1, 1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    for name, expected in (("hpsv2", "longest"), ("clip", "shortest")):
        made = build("rewards", {"name": name, "architecture": "tiny", "weights": str(weights)})
        scorer = made.load("cpu")  # type: ignore[attr-defined]
        towers = build_towers("tiny", pretrained=str(weights)).eval()
        transform = open_clip.transform.image_transform_v2(
            open_clip.transform.PreprocessCfg(
                size=towers.preprocess.size,
                mean=towers.preprocess.mean,
                std=towers.preprocess.std,
                resize_mode=expected,
                interpolation="bicubic",
                fill_color=0,
            ),
            is_train=False,
        )
        from PIL import Image

        picture = Image.fromarray((wide[0, 0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
        with torch.no_grad():
            image = towers.clip.encode_image(transform(picture)[None], normalize=True)  # type: ignore[operator,index]
            text = towers.clip.encode_text(towers.tokenizer(PROMPTS[:1]), normalize=True)
            found = scorer(wide, PROMPTS[:1])
        # PIL rounds what it resized to bytes
        torch.testing.assert_close(found, (image * text).sum(-1), atol=0.02, rtol=0)


def _head(folder: Path, widths: tuple[int, ...]) -> Path:
    torch.manual_seed(0)
    sizes = itertools.pairwise(widths)
    tensors = {}
    for place, (wide, narrow) in zip((0, 2, 4, 6, 7), sizes, strict=True):
        layer = torch.nn.Linear(wide, narrow)
        tensors |= {f"layers.{place}.weight": layer.weight.detach(), f"layers.{place}.bias": layer.bias.detach()}
    save_file(tensors, folder / "head.safetensors")
    return folder / "head.safetensors"


def test_the_aesthetic_head_is_affine_on_a_unit_vector(tmp_path: Path, media: torch.Tensor, weights: Path) -> None:
    """O22: f((u + v) / 2) = (f(u) + f(v)) / 2 on vectors, the layers one after the other give the same, vectors have norm 1."""
    towers = build_towers("tiny", pretrained=str(weights)).eval()
    width = towers.images(media).shape[-1]
    widths = (width, 16, 8, 6, 4, 1)
    head = _head(tmp_path, widths)
    weight_D, bias = read_head(str(head), "rewards.aesthetic.head")
    from safetensors.torch import load_file

    tensors = load_file(head)
    module = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    for layer, place in zip(module, (0, 2, 4, 6, 7), strict=True):
        layer.load_state_dict({"weight": tensors[f"layers.{place}.weight"], "bias": tensors[f"layers.{place}.bias"]})
    u, v = torch.randn(2, width)
    with torch.no_grad():
        torch.testing.assert_close(u @ weight_D + bias, module(u)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            ((u + v) / 2) @ weight_D + bias, (module(u)[0] + module(v)[0]) / 2, atol=1e-5, rtol=1e-5
        )
        unit = towers.images(media)
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2, 1))
        settings = {"name": "aesthetic", "architecture": "tiny", "weights": str(weights), "head": str(head)}
        scorer = build("rewards", settings).load("cpu")  # type: ignore[attr-defined]
        torch.testing.assert_close(scorer(media, PROMPTS), module(unit[:, 0])[:, 0], atol=1e-5, rtol=1e-5)
    _gradient_reaches(scorer, media)


def test_pickscore_is_transformers_own_logits(tmp_path: Path) -> None:
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
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.eos_token_id = tokenizer.eos_token_id
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "words")
    settings = {"name": "pickscore", "path": str(tmp_path / "model"), "tokenizer": str(tmp_path / "words")}
    scorer = build("rewards", settings).load("cpu")  # type: ignore[attr-defined]
    media = torch.rand(2, 1, 3, 32, 32)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (media[:, 0] - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
        torch.testing.assert_close(scorer(media, PROMPTS), expected, atol=1e-5, rtol=1e-5)
    _gradient_reaches(scorer, media)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "clip", "architecture": "ViT-L-15"}, "rewards.clip.architecture: no 'ViT-L-15'; did you mean"),
        (
            {"name": "clip", "architecture": "tiny", "weights": "no/such/file.safetensors"},
            "rewards.clip.weights must name",
        ),
        ({"name": "hpsv2", "architecture": "tiny", "weights": "HPS_v2.1_compressed.pt"}, "nothing is unpickled"),
        ({"name": "clip", "architecture": "tiny"}, "from the hub"),
        ({"name": "pickscore"}, "rewards.pickscore: cannot load 'yuvalkirstain/PickScore_v1'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_what_cannot_be_loaded_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        build("rewards", settings).load("cpu")  # type: ignore[attr-defined]
    assert message in str(refusal.value)
