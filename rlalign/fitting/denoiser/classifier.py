"""Training of the noise-aware classifier: cross-entropy of every fact of a caption, on latents at
every noise level."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from rlalign.diffusion.noise import generator, normal
from rlalign.fitting.denoiser import stages
from rlalign.fitting.denoiser.settings import Pretrain
from rlalign.networks.noisy_classifier import FactClassifier


def train_classifier(
    config: Pretrain,
    latents_NCHW: torch.Tensor,
    captions: list[str],
    saved: dict[str, torch.Tensor],
    train: Callable[..., None],
) -> Path:
    """All updates that the classifier still lacks; returns ``out/classifier``."""
    assert config.classifier is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = FactClassifier(latents_NCHW.shape[1], config.classifier.width)
    stage = stages.Stage("classifier", network, config.classifier, saved)
    train(stage, classifier_loss(network, latents_NCHW, captions, config), {})
    stage.keep_average()
    folder = config.out / "classifier"
    network.save(folder)
    return folder


def classifier_loss(
    network: FactClassifier, latents_NCHW: torch.Tensor, captions: list[str], config: Pretrain
) -> Callable[[int], torch.Tensor]:
    """Update -> minus the mean log-probability of the captions of the update's own batch, each at
    its own noise level.

    Levels are uniform in s of alpha = 1 - s, sigma = s; only the ratio of the two matters to the
    network.
    """
    settings = config.classifier
    assert settings is not None

    def loss(update: int) -> torch.Tensor:
        # which latents, at which levels
        key = ("pretrain", config.seed, "classifier", update)
        rng = generator(*key, "rows")
        rows_B = rng.integers(len(latents_NCHW), size=settings.batch)
        sigma_B = torch.from_numpy(rng.uniform(0.002, 0.998, size=settings.batch)).float()

        # the classifier reads them with noise
        clean_BCHW = latents_NCHW[torch.from_numpy(rows_B)]
        a, s = (v.reshape(-1, 1, 1, 1) for v in (1.0 - sigma_B, sigma_B))
        x_BCHW = a * clean_BCHW + s * normal((*key, "noise"), clean_BCHW.shape)
        return -network.log_prob(
            x_BCHW, 1.0 - sigma_B, sigma_B, [captions[n] for n in rows_B]
        ).mean()

    return loss
