"""A pretraining run from the settings to the pipeline folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlalign.diffusion.paths import VariancePreserving
from rlalign.pretrain import stages
from rlalign.pretrain.classifier import train_classifier
from rlalign.pretrain.flow import flow_components, flow_loss, write_flow_pipeline
from rlalign.pretrain.pipeline import components, load_vae, tokenise, write_pipeline
from rlalign.pretrain.settings import Pretrain
from rlalign.progress import Report, console_progress
from rlalign.stage_checkpoints import StageCheckpoints


def pretrain(config: Pretrain, *, resume: bool = True, progress: Report | None = None) -> Path:
    """Trains both stages and writes the pipeline; returns its folder, ``out/policy`` (``out/classifier`` for a classifier).

    With ``resume`` it goes on from the newest checkpoint of ``out``; without, earlier checkpoints are deleted. Raises
    UserError when the checkpoint was made under other settings (the numbers of updates may be raised).
    """
    settings = config.model_dump(mode="json", exclude={"out", "checkpoint_every"})
    checkpoints = StageCheckpoints(
        config.out / "checkpoints",
        settings,
        every=config.checkpoint_every,
        grows="denoiser.updates" if config.classifier is None else "classifier.updates",
    )
    saved = checkpoints.newest() if resume else checkpoints.clear()
    with contextlib.nullcontext(progress) if progress else console_progress() as report:
        pictures_NCHW, captions = stages.pictures(config)
        parts = components(config)
        vae, latents_NCHW, earlier = _latents(config, parts.vae, pictures_NCHW, saved, checkpoints, report)
        parts, tokenizer = replace(parts, vae=vae), parts.tokenizer
        if config.classifier is not None:
            return train_classifier(
                config, latents_NCHW, captions, saved, partial(_train, checkpoints=checkpoints, report=report)
            )
        words = tokenise(tokenizer, captions), tokenise(tokenizer, [""])
        flow = flow_components(config) if config.denoiser.family == "transformer" else None
        if flow is not None:
            network = flow.module()
            loss = flow_loss(network, latents_NCHW, *words, config)
        else:
            network = torch.nn.ModuleDict({"unet": parts.unet, "text_encoder": parts.text_encoder})
            path = VariancePreserving(parts.scheduler.alphas_cumprod)
            loss = stages.denoiser_loss(network, latents_NCHW, *words, path, config)
        stage = stages.Stage("denoiser", network, config.denoiser, saved)
        _train(stage, loss, earlier, checkpoints, report)
        stage.keep_average()
    folder = config.out / "policy"
    return write_flow_pipeline(flow, vae, folder) if flow is not None else write_pipeline(parts, folder)


def _latents(
    config: Pretrain,
    fresh: Any,
    pictures_NCHW: torch.Tensor,
    saved: dict[str, torch.Tensor],
    checkpoints: StageCheckpoints,
    report: Report,
) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    """The autoencoder (taken from a pipeline, or trained), the latents of all pictures, and its stage's state."""
    if config.autoencoder.source:
        vae = load_vae(config.autoencoder.source)
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        return vae, (stages.encode_all(vae, pictures_NCHW) - shift) * scale, {}
    first = stages.Stage("autoencoder", fresh, config.autoencoder, saved)
    _train(first, stages.autoencoder_loss(fresh, pictures_NCHW, config), {}, checkpoints, report)
    first.keep_average()
    latents_NCHW = stages.standardise(fresh, pictures_NCHW)
    return fresh, latents_NCHW, first.state()


def _train(
    stage: stages.Stage,
    loss: Callable[[int], torch.Tensor],
    earlier: dict[str, torch.Tensor],
    checkpoints: StageCheckpoints,
    report: Report,
) -> None:
    """All updates that a stage still lacks; ``earlier`` is the state of the stages before it."""
    total = stage.settings.updates
    while stage.done < total:
        value = loss(stage.done)
        stage.step(value)
        if stage.done % checkpoints.every == 0 or stage.done == total:
            checkpoints.save(stage.name, stage.done, earlier | stage.state())
        report(stage.name, stage.done, total, float(value.detach()))
