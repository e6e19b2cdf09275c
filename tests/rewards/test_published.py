"""The published rewards on small models of the same classes: against the libraries' own forward
passes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlalign.cli import main
from rlalign.core.registry import UserError, build
from rlalign.networks.towers import build_towers
from rlalign.rewards.aesthetic import read_head
from tests.rewards.small_models import (
    PublishedImageReward,
    checkpoint_of,
    save_clip,
    save_head,
    save_imagereward,
    save_pickscore,
)

PROMPTS = ["a red circle", "two blue squares above a white cross"]


@pytest.fixture(scope="module")
def media() -> torch.Tensor:
    return torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: Any) -> Path:
    """An open_clip file of the tiny architecture."""
    return save_clip(tmp_path_factory.mktemp("clip"))


def _gradient_reaches(scorer: Any, media: torch.Tensor) -> None:
    wanted = media.clone().requires_grad_()
    scorer(wanted, PROMPTS).sum().backward()
    assert wanted.grad is not None
    assert float(wanted.grad.abs().max()) > 0


@pytest.mark.parametrize(("name", "more"), [("clip", {}), ("hpsv2", {"antialias": True})])
def test_it_is_the_cosine_of_open_clips_own_vectors(
    name: str, more: dict[str, Any], media: torch.Tensor, weights: Path
) -> None:
    settings = {"name": name, "architecture": "tiny", "weights": str(weights), "scale": 2.5, **more}
    scorer = build("rewards", settings).load("cpu")  # type: ignore[attr-defined]
    towers = build_towers("tiny", pretrained=str(weights)).eval()
    with torch.no_grad():
        image, text, _ = towers.clip(towers.preprocess(media[:, 0]), towers.tokenizer(PROMPTS))[:3]
        torch.testing.assert_close(
            scorer(media, PROMPTS), 2.5 * (image * text).sum(-1), atol=1e-5, rtol=1e-5
        )
    _gradient_reaches(scorer, media)


def test_hpsv2_pads_the_shorter_side_and_clip_cuts_the_longer(weights: Path) -> None:
    import open_clip

    wide = torch.rand(1, 1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    for name, expected, more in (
        ("hpsv2", "longest", {"antialias": True}),
        ("clip", "shortest", {}),
    ):
        made = build(
            "rewards", {"name": name, "architecture": "tiny", "weights": str(weights), **more}
        )
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

        picture = Image.fromarray(
            (wide[0, 0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        )
        with torch.no_grad():
            image = towers.clip.encode_image(transform(picture)[None], normalize=True)  # type: ignore[operator,index]
            text = towers.clip.encode_text(towers.tokenizer(PROMPTS[:1]), normalize=True)
            found = scorer(wide, PROMPTS[:1])
        # PIL rounds what it resized to bytes
        torch.testing.assert_close(found, (image * text).sum(-1), atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", [(96, 96), (96, 60), (41, 96)])
def test_hpsv2_resizes_as_the_published_scores_were_taken(
    weights: Path, shape: tuple[int, int]
) -> None:
    """torchvision's own functions on a tensor, as before 0.17 without antialiasing: the longest
    side to the model's, the rest padded with black in halves, the first one rounded down. The clean
    filter's pixels and scores are others.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    pictures = torch.rand(2, 1, 3, *shape, generator=torch.Generator().manual_seed(2))
    settings = {"name": "hpsv2", "architecture": "tiny", "weights": str(weights)}
    published, clean = (
        build("rewards", {**settings, **more}).load("cpu")  # type: ignore[attr-defined]
        for more in ({}, {"antialias": True})
    )
    towers = build_towers("tiny", pretrained=str(weights)).eval()
    side = towers.preprocess.size[0]
    inner = [round(n * side / max(shape)) for n in shape]
    small = vision.resize(pictures[:, 0], inner, InterpolationMode.BICUBIC, antialias=False)
    high, wide = side - inner[0], side - inner[1]
    padded = vision.pad(small, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=0)
    normal = vision.normalize(padded, list(towers.preprocess.mean), list(towers.preprocess.std))
    smoothed = replace(towers.preprocess, resize_mode="longest")(pictures[:, 0])
    assert float((smoothed - normal).abs().max()) > 0.5
    with torch.no_grad():
        image = towers.clip.encode_image(normal, normalize=True)  # type: ignore[operator]
        text = towers.clip.encode_text(towers.tokenizer(PROMPTS), normalize=True)  # type: ignore[operator]
        expected = (image * text).sum(-1)
        torch.testing.assert_close(published(pictures, PROMPTS), expected, atol=2e-6, rtol=0)
        assert float((clean(pictures, PROMPTS) - expected).abs().max()) > 1e-5
    _gradient_reaches(published, pictures)


def test_the_aesthetic_head_is_affine_on_a_unit_vector(
    tmp_path: Path, media: torch.Tensor, weights: Path
) -> None:
    """O22: f((u + v) / 2) = (f(u) + f(v)) / 2 on vectors, the layers one after the other give the
    same, vectors have norm 1."""
    towers = build_towers("tiny", pretrained=str(weights)).eval()
    width = towers.images(media).shape[-1]
    widths = (width, 16, 8, 6, 4, 1)
    head = save_head(tmp_path, widths)
    weight_D, bias = read_head(str(head), "rewards.aesthetic.head")
    tensors = load_file(head)
    module = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    for layer, place in zip(module, (0, 2, 4, 6, 7), strict=True):
        layer.load_state_dict(
            {"weight": tensors[f"layers.{place}.weight"], "bias": tensors[f"layers.{place}.bias"]}
        )
    u, v = torch.randn(2, width)
    with torch.no_grad():
        torch.testing.assert_close(u @ weight_D + bias, module(u)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            ((u + v) / 2) @ weight_D + bias, (module(u)[0] + module(v)[0]) / 2, atol=1e-5, rtol=1e-5
        )
        unit = towers.images(media)
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2, 1))
        settings = {
            "name": "aesthetic",
            "architecture": "tiny",
            "weights": str(weights),
            "head": str(head),
        }
        scorer = build("rewards", settings).load("cpu")  # type: ignore[attr-defined]
        torch.testing.assert_close(
            scorer(media, PROMPTS), module(unit[:, 0])[:, 0], atol=1e-5, rtol=1e-5
        )
    _gradient_reaches(scorer, media)


def test_pickscore_is_transformers_own_logits(tmp_path: Path) -> None:
    model, tokenizer, settings = save_pickscore(tmp_path)
    scorer = build("rewards", settings).load("cpu")  # type: ignore[attr-defined]
    media = torch.rand(2, 1, 3, 32, 32)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (media[:, 0] - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    tokens = tokenizer(
        PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
        torch.testing.assert_close(scorer(media, PROMPTS), expected, atol=1e-5, rtol=1e-5)
    _gradient_reaches(scorer, media)


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory: Any) -> tuple[PublishedImageReward, Any, dict[str, Any]]:
    """The network, its tokenizer, and the settings that name their files."""
    return save_imagereward(tmp_path_factory.mktemp("imagereward"))


def test_imagereward_is_the_network_of_thecheckpoint_of(
    image_reward: Any, media: torch.Tensor
) -> None:
    """Built here from timm's and BERT's own code, read there into BLIP's classes; captions shorter
    and longer than 35 tokens."""
    model, words, settings = image_reward
    scorer = build("rewards", settings).load("cpu")  # type: ignore[attr-defined]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = (media[:, 0] - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    prompts = [
        "a red circle",
        "two blue squares above a white cross and a very long rest that is cut off",
    ]
    tokens = words(
        prompts, padding="max_length", max_length=35, truncation=True, return_tensors="pt"
    )
    assert tokens.attention_mask.sum(1).tolist() == [5, 35]
    with torch.no_grad():
        expected = model(pixels, tokens)
        torch.testing.assert_close(scorer(media, prompts), expected, atol=1e-4, rtol=1e-5)
        assert float((expected[0] - expected[1]).abs()) > 1.0
        clip = media.expand(-1, 3, -1, -1, -1).clone()
        clip[:, 1:] = 1 - clip[:, 1:]
        frames = torch.stack([scorer(clip[:, f : f + 1], prompts) for f in range(3)], dim=1)
        torch.testing.assert_close(scorer(clip, prompts), frames.mean(1), atol=1e-5, rtol=1e-5)
    _gradient_reaches(scorer, media)


def _converted(pickled: dict[str, Any], folder: Path, printed: pytest.CaptureFixture[str]) -> str:
    """The reward's line that ``rlalign convert`` prints for what torch saved."""
    torch.save(pickled, folder / "published.pt")
    assert main(["convert", str(folder / "published.pt")]) == 0
    return printed.readouterr().out.splitlines()[1].partition("rewards: ")[2]


def test_a_converted_imagereward_scores_as_before(
    image_reward: Any,
    media: torch.Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The authors save a plain state_dict."""
    model, _, settings = image_reward
    line = _converted(model.state_dict(), tmp_path, capsys)
    assert line == f"[{{name: imagereward, weights: {tmp_path / 'published.safetensors'}}}]"
    made = {**settings, "weights": str(tmp_path / "published.safetensors")}
    scores = [build("rewards", s).load("cpu")(media, PROMPTS) for s in (settings, made)]  # type: ignore[attr-defined]
    torch.testing.assert_close(scores[0], scores[1], atol=0, rtol=0)


def test_a_converted_hpsv2_scores_as_before(
    media: torch.Tensor, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The authors wrap the state_dict of an open_clip model."""
    wrapped = {"epoch": 3, "name": "hps", "state_dict": load_file(weights)}
    line = _converted(wrapped, tmp_path, capsys)
    # of other sizes than ViT-H-14's
    assert line.startswith("[{name: hpsv2, weights:")
    assert line.endswith(", architecture: NAME}]")
    settings = {"name": "hpsv2", "architecture": "tiny"}
    scores = [
        build("rewards", {**settings, "weights": str(w)}).load("cpu")(media, PROMPTS)  # type: ignore[attr-defined]
        for w in (weights, tmp_path / "published.safetensors")
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=0, rtol=0)


def test_a_converted_aesthetic_head_scores_as_before(
    media: torch.Tensor, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The authors save a plain state_dict of a Sequential under ``layers``."""
    width = build_towers("tiny").images(media).shape[-1]
    head = save_head(tmp_path, (width, 16, 8, 6, 4, 1))
    line = _converted(load_file(head), tmp_path, capsys)
    assert line == f"[{{name: aesthetic, head: {tmp_path / 'published.safetensors'}}}]"
    settings = {"name": "aesthetic", "architecture": "tiny", "weights": str(weights)}
    scores = [
        build("rewards", {**settings, "head": str(h)}).load("cpu")(media, PROMPTS)  # type: ignore[attr-defined]
        for h in (head, tmp_path / "published.safetensors")
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            "blip.visual_encoder.blocks.1.norm1.weight",
            "has no 'encoder.layers.1.layer_norm1.weight'",
        ),
        (
            "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias",
            "crossattention.self.key.bias",
        ),
        ("mlp.layers.6.bias", "has no 'mlp.layers.6.bias'"),
        ("blip.visual_encoder.patch_embed.proj.weight", "has no 'patch_embed.proj.weight'"),
    ],
)
def test_imagereward_without_a_tensor_is_refused(
    image_reward: Any, tmp_path: Path, lost: str, message: str
) -> None:
    model, _, settings = image_reward
    save_file(
        {n: t for n, t in checkpoint_of(model).items() if n != lost}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UserError, match="is of another model") as refusal:
        build("rewards", {**settings, "weights": str(tmp_path / "a.safetensors")}).load("cpu")  # type: ignore[attr-defined]
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "clip", "architecture": "ViT-L-15"},
            "rewards.clip.architecture: no 'ViT-L-15'; did you mean",
        ),
        (
            {"name": "clip", "architecture": "tiny", "weights": "no/such/file.safetensors"},
            "rewards.clip.weights must name",
        ),
        (
            {"name": "hpsv2", "architecture": "tiny", "weights": "HPS_v2.1_compressed.pt"},
            "nothing is unpickled",
        ),
        ({"name": "clip", "architecture": "tiny"}, "from the hub"),
        ({"name": "pickscore"}, "rewards.pickscore: cannot load 'yuvalkirstain/PickScore_v1'"),
        (
            {"name": "imagereward", "weights": "ImageReward.pt"},
            "(rlalign convert turns ImageReward.pt into one)",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_what_cannot_be_loaded_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        build("rewards", settings).load("cpu")  # type: ignore[attr-defined]
    assert message in str(refusal.value)
