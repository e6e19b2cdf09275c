"""open_clip models in a folder: the same numbers as open_clip's own forward pass and transforms,
and clear errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from rlalign.core.registry import UserError
from rlalign.networks.towers import (
    CONFIG,
    REWARD,
    WEIGHTS,
    Preprocess,
    build_towers,
    load_towers,
    save_towers,
)

CAPTIONS = ["a red circle", "two green crosses above a white triangle", "a red circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("towers") / "reward"
    save_towers(build_towers("tiny", seed=3), path, {"held_out": {"accuracy": 0.5}})
    return path


def media(count: int, size: int = 64, frames: int = 1) -> torch.Tensor:
    return torch.rand(count, frames, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_plain_open_clip_loads_the_folder_and_gives_the_same_scores(folder: Path) -> None:
    import open_clip

    towers = load_towers(folder, "here")
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    pictures = media(3)
    with torch.no_grad():
        image, text, scale = model((pictures[:, 0] - 0.5) / 0.5, tokens)
        expected = scale * (image * text).sum(-1)
        torch.testing.assert_close(towers(pictures, CAPTIONS), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_keyed_and_come_back_exactly(folder: Path) -> None:
    first, again, other = (build_towers("tiny", seed=s).state_dict() for s in (3, 3, 4))
    loaded = load_towers(folder, "here").state_dict()
    assert all(torch.equal(first[n], again[n]) and torch.equal(first[n], loaded[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)
    said = json.loads((folder / REWARD).read_text())
    assert said["architecture"] == "tiny" and said["score"] == "exp(logit_scale) * cos(image, text)"
    assert said["preprocess"]["size"] == [said["preprocess"]["size"][0]] * 2 and said[
        "held_out"
    ] == {"accuracy": 0.5}


def test_a_clips_score_is_the_mean_over_its_frames(folder: Path) -> None:
    towers, clip = load_towers(folder, "here"), media(2, frames=3)
    each = torch.stack([towers(clip[:, f : f + 1], CAPTIONS[:2]) for f in range(3)])
    torch.testing.assert_close(towers(clip, CAPTIONS[:2]), each.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (20, 20), (32, 32)])
def test_preprocessing_is_open_clips_on_tensors(mode: str, shape: tuple[int, int]) -> None:
    """Against open_clip's transform of the same uint8 picture (PIL's bicubic): within 2.5 of 255
    where pixels are smooth."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    rows, columns = (torch.linspace(0, 1, n) for n in shape)
    picture = torch.stack(
        [rows[:, None].expand(shape), columns.expand(shape), (rows[:, None] + columns) / 2]
    )
    picture = (picture * 255).round() / 255
    cfg = PreprocessCfg(
        size=32, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode=mode, interpolation="bicubic"
    )
    pil = Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy())
    expected = image_transform_v2(cfg, is_train=False)(pil)
    found = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode=mode)(
        picture[None]
    )[0]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 2 * 2.5 / 255


def test_any_architecture_of_open_clips_is_found_by_name() -> None:
    towers = build_towers("RN50")
    assert (
        towers.preprocess.size == (224, 224) and sum(p.numel() for p in towers.parameters()) > 1e8
    )
    with pytest.raises(
        UserError, match=r"model\.architecture: no 'ViT-B-33'; did you mean 'ViT-B-32'\?"
    ):
        build_towers("ViT-B-33")


def test_weights_to_start_from_are_safetensors_of_the_same_model(
    folder: Path, tmp_path: Path
) -> None:
    started = build_towers("tiny", seed=9, pretrained=str(folder / WEIGHTS)).state_dict()
    assert all(
        torch.equal(started[n], t) for n, t in load_towers(folder, "here").state_dict().items()
    )
    (tmp_path / "weights.pt").write_bytes(b"pickled")
    with pytest.raises(
        UserError,
        match=r"model\.pretrained must name an existing \.safetensors file, got .*weights\.pt",
    ):
        build_towers("tiny", pretrained=str(tmp_path / "weights.pt"))
    shutil.copy(folder / WEIGHTS, tmp_path / "of_another.safetensors")
    config = json.loads((folder / CONFIG).read_text())
    config["model_cfg"]["text_cfg"] |= {"width": 32}
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)  # "." in the config means beside it
    (tmp_path / "other.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.pretrained: .* is damaged or of another model"):
        build_towers(
            str(tmp_path / "other.json"), pretrained=str(tmp_path / "of_another.safetensors")
        )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            REWARD,
            None,
            "must be a folder written by rlalign fit-reward, got .* without reward.json",
        ),
        (WEIGHTS, None, "without open_clip_model.safetensors"),
        (REWARD, "{", "must be a readable JSON file"),
        (REWARD, '{"format": "other"}', "must have the format 'rlalign reward 1', got 'other'"),
        (WEIGHTS, "short", "is damaged or of another model"),
        (CONFIG, "{}", "must hold a mapping under model_cfg"),
        (
            CONFIG,
            '{"model_cfg": {"embed_dim": 8, "text_cfg": {}}}',
            "open_clip cannot build this model",
        ),
        ("tokenizer.json", None, "is incomplete: tokenizer.json is missing"),
    ],
)
def test_a_missing_or_damaged_folder_is_one_message(
    folder: Path, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / name).unlink()
    if text is not None:
        (copy / name).write_text(text)
    with pytest.raises(UserError, match=rf"^rewards\.mine\.path.*{message}"):
        load_towers(copy, "rewards.mine.path")
