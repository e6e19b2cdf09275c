"""A pretraining run from the settings to the pipeline folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlalign.core.locations import locate
from rlalign.core.progress import Report, console_progress
from rlalign.diffusion.paths import VariancePreserving
from rlalign.fitting.checkpoints import StageCheckpoints
from rlalign.fitting.denoiser import stages
from rlalign.fitting.denoiser.classifier import train_classifier
from rlalign.fitting.denoiser.corpus import clips, pictures
from rlalign.fitting.denoiser.flow import flow_components, flow_loss, write_flow_pipeline
from rlalign.fitting.denoiser.pipeline import components, load_vae, tokenise, write_pipeline
from rlalign.fitting.denoiser.plans import pretrain_planner
from rlalign.fitting.denoiser.settings import Pretrain
from rlalign.fitting.denoiser.video import (
    clip_autoencoder,
    clip_autoencoder_loss,
    clip_tokenizer,
    clip_tokens,
    load_clip_autoencoder,
    standardised_clips,
    video_components,
    video_loss,
    write_video_pipeline,
)


def pretrain(config: Pretrain, *, resume: bool = True, progress: Report | None = None) -> Path:
    """Trains both stages and writes the pipeline; returns its folder, ``out/policy``
    (``out/classifier`` for a classifier).

    With ``resume`` it goes on from the newest checkpoint of ``out``; without, earlier checkpoints
    are deleted. Raises UserError when the checkpoint was made under other settings (the numbers of
    updates may be raised).
    """
    # for what is not there; paths stay as they are, since checkpoints are of these settings
    locate(config)

    # what may not change between a checkpoint and the run that goes on from it
    settings = config.model_dump(mode="json", exclude={"out", "checkpoint_every"})
    checkpoints = StageCheckpoints(
        config.out / "checkpoints",
        settings,
        every=config.checkpoint_every,
        grows="denoiser.updates" if config.classifier is None else "classifier.updates",
    )
    saved = checkpoints.newest() if resume else checkpoints.clear()
    with contextlib.nullcontext(progress) if progress else console_progress() as report:
        train = partial(_train, checkpoints=checkpoints, report=report)
        if config.task == "motion":
            return _pretrain_video(config, saved, train)
        if config.task == "mazes":
            return pretrain_planner(config, saved, train)

        # the corpus, as latents of the autoencoder
        pictures_NCHW, captions = pictures(config)
        parts = components(config)
        vae, latents_NCHW, earlier = _latents(config, parts.vae, pictures_NCHW, saved, train)

        # a classifier on these latents, or a denoiser of one of the two families
        if config.classifier is not None:
            return train_classifier(config, latents_NCHW, captions, saved, train)
        corpus = _Corpus(
            latents_NCHW, tokenise(parts.tokenizer, captions), tokenise(parts.tokenizer, [""])
        )
        if config.denoiser.family == "transformer":
            flow = flow_components(config)
            network = flow.module()
            loss = flow_loss(network, *corpus, config)
            write = partial(write_flow_pipeline, flow, vae, config.task)
        else:
            network = torch.nn.ModuleDict({"unet": parts.unet, "text_encoder": parts.text_encoder})
            path = VariancePreserving(parts.scheduler.alphas_cumprod)
            loss = stages.denoiser_loss(network, *corpus, path, config)
            write = partial(write_pipeline, replace(parts, vae=vae), config.task)
        stage = stages.Stage("denoiser", network, config.denoiser, saved)
        train(stage, loss, earlier)
        stage.keep_average()
    return write(config.out / "policy")


class _Corpus(NamedTuple):
    """What a denoiser learns from."""

    latents_NCHW: torch.Tensor
    tokens_NL: torch.Tensor
    empty_1L: torch.Tensor
    """Tokens of the empty caption."""


def _latents(
    config: Pretrain,
    fresh: Any,
    pictures_NCHW: torch.Tensor,
    saved: dict[str, torch.Tensor],
    train: Callable[..., None],
) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    """The autoencoder (taken from a pipeline, or trained), the latents of all pictures, and its
    stage's state."""
    if config.autoencoder.source:
        vae = load_vae(config.autoencoder.source)
        shift = vae.config.shift_factor or 0.0
        scale = vae.config.scaling_factor
        return vae, (stages.encode_all(vae, pictures_NCHW) - shift) * scale, {}
    first = stages.Stage("autoencoder", fresh, config.autoencoder, saved)
    train(first, stages.autoencoder_loss(fresh, pictures_NCHW, config), {})
    first.keep_average()
    latents_NCHW = stages.standardise(fresh, pictures_NCHW)
    return fresh, latents_NCHW, first.state()


def _pretrain_video(
    config: Pretrain, saved: dict[str, torch.Tensor], train: Callable[..., None]
) -> Path:
    """The same two stages on clips; returns ``out/policy``."""
    # the corpus, as latents of the autoencoder
    clips_NCFHW, captions = clips(config)
    earlier: dict[str, torch.Tensor] = {}
    if config.autoencoder.source:
        vae = load_clip_autoencoder(config.autoencoder.source)
    else:
        vae = clip_autoencoder(config)
        first = stages.Stage("autoencoder", vae, config.autoencoder, saved)
        train(first, clip_autoencoder_loss(vae, clips_NCFHW, config), {})
        first.keep_average()
        earlier = first.state()
    latents = standardised_clips(vae, clips_NCFHW, measure=not config.autoencoder.source)

    # the denoiser and its text encoder
    parts = video_components(config)
    network = parts.module()
    tokenizer = clip_tokenizer()
    tokens_NL = clip_tokens(tokenizer, captions)
    loss = video_loss(network, latents, tokens_NL, clip_tokens(tokenizer, [""]), config)
    stage = stages.Stage("denoiser", network, config.denoiser, saved)
    train(stage, loss, earlier)
    stage.keep_average()
    return write_video_pipeline(parts, vae, config.out / "policy")


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
