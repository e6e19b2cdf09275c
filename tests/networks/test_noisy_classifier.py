"""The noise-aware classifier: what it knows at each noise level, its training, its file, and its
way into guidance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlalign.core.registry import UserError, build
from rlalign.data.shapes import draw, random_scene
from rlalign.diffusion.noise import generator
from rlalign.fitting.denoiser import Pretrain, pretrain
from rlalign.networks.noisy_classifier import FactClassifier, load_classifier, targets


def _latents(count: int) -> tuple[torch.Tensor, list[str]]:
    """Clean latents of freshly drawn pictures, and their captions."""
    rng = generator("test", "classifier")
    scenes = [random_scene(rng, "held_out") for _ in range(count)]
    media = (
        torch.from_numpy(np.stack([draw(s, rng) for s in scenes])).permute(0, 3, 1, 2).float()
        / 255.0
    )
    policy = build("policies", {"name": "tiny"}).load("cpu")  # type: ignore[attr-defined]
    with torch.no_grad():
        return policy.encode_media(media[:, None]), [s.caption for s in scenes]


def test_the_shipped_one_tells_the_right_caption_from_another_and_less_so_the_noisier() -> None:
    """96 held-out pictures: the right caption is likelier than a neighbour's in over 95 % at no
    noise, over 80 % at half, and at all noise in about half (within 0.2: four standard errors)."""
    clean, captions = _latents(96)
    judge, rights = load_classifier("", "cpu"), {}
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for s in (0.01, 0.5, 0.999):
        alpha, sigma = torch.tensor(1.0 - s), torch.tensor(s)
        x = alpha * clean + sigma * noise
        with torch.no_grad():
            own, others = (
                judge(x, alpha, sigma, captions),
                judge(x, alpha, sigma, [*captions[1:], captions[0]]),
            )
        rights[s] = float((own > others).float().mean())
    assert rights[0.01] > 0.95
    assert rights[0.5] > 0.8
    assert abs(rights[0.999] - 0.5) < 0.2


def test_only_the_ratio_of_noise_to_signal_matters() -> None:
    """The same picture on the flow path and, scaled to unit variance, on the variance-preserving
    one."""
    clean, captions = _latents(4)
    judge = load_classifier("", "cpu")
    alpha, sigma = torch.tensor(0.6), torch.tensor(0.4)
    x = alpha * clean + sigma * torch.ones_like(clean)
    scale = (alpha**2 + sigma**2).sqrt()
    torch.testing.assert_close(
        judge(x, alpha, sigma, captions),
        judge(x / scale, alpha / scale, sigma / scale, captions),
        atol=1e-4,
        rtol=1e-4,
    )


def test_its_probabilities_are_probabilities() -> None:
    """Numbers and shapes of each colour sum to 1; of "i left of j" and "j left of i" exactly one is
    true."""
    numbers, shapes, relations = FactClassifier()(
        torch.randn(3, 4, 16, 16), torch.tensor(0.5), torch.tensor(0.5)
    )
    for value in (numbers, shapes):
        torch.testing.assert_close(value.exp().sum(-1), torch.ones(3, 6))
    torch.testing.assert_close(
        relations.exp() + relations.transpose(1, 2).exp(), torch.ones_like(relations)
    )


def test_a_caption_becomes_its_facts() -> None:
    numbers, shapes, pairs = targets(["two red crosses above a blue circle", "a white square"])
    assert numbers[0].tolist() == [2, 0, 1, 0, 0, 0]
    assert shapes[0].tolist() == [3, -1, 0, -1, -1, -1]
    assert pairs.tolist() == [[0, 2, 1], [-1, -1, -1]]


def test_training_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Six updates in one go, or four and then six: the same file, bit for bit."""

    def settings(out: str, updates: int) -> Pretrain:
        return Pretrain.model_validate(
            {
                "out": tmp_path / out,
                "images": 64,
                "autoencoder": {"source": "tiny"},
                "classifier": {"updates": updates, "batch": 8, "width": 8},
                "checkpoint_every": 2,
            }
        )

    def quiet(stage: str, done: int, total: int, loss: float) -> None:
        assert stage == "classifier"
        assert np.isfinite(loss)

    whole = pretrain(settings("whole", 6), progress=quiet)
    pretrain(settings("parts", 4), progress=quiet)
    parts = pretrain(settings("parts", 6), progress=quiet)
    assert (whole / "classifier.safetensors").read_bytes() == (
        parts / "classifier.safetensors"
    ).read_bytes()
    assert whole.name == "classifier"


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    FactClassifier(width=8).save(tmp_path / "ours")
    load_classifier(str(tmp_path / "ours"), "cpu")
    (tmp_path / "ours" / "classifier.safetensors").write_bytes(b"not weights")
    load_classifier.cache_clear()
    with pytest.raises(
        UserError,
        match=r"sampler\.classifier must be a folder that rlalign pretrain wrote, got .*ours",
    ):
        load_classifier(str(tmp_path / "ours"), "cpu")


def test_a_denoiser_and_a_classifier_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="denoiser has no meaning where a classifier is trained"):
        Pretrain.model_validate(
            {"classifier": {}, "denoiser": {}, "autoencoder": {"source": "tiny"}}
        )
    with pytest.raises(ValueError, match=r"autoencoder\.source must name a trained one"):
        Pretrain.model_validate({"classifier": {}})
