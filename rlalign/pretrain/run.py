"""A pretraining run from the settings to the pipeline folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from rlalign.diffusion.paths import VariancePreserving
from rlalign.pretrain import stages
from rlalign.pretrain.pipeline import components, tokenise, write_pipeline
from rlalign.pretrain.settings import Pretrain
from rlalign.progress import Report, console_progress
from rlalign.stage_checkpoints import StageCheckpoints


def pretrain(config: Pretrain, *, resume: bool = True, progress: Report | None = None) -> Path:
    """Trains both stages and writes the pipeline; returns its folder, ``out/policy``.

    With ``resume`` it goes on from the newest checkpoint of ``out``; without, earlier checkpoints are deleted. Raises
    UserError when the checkpoint was made under other settings (the numbers of updates may be raised).
    """
    settings = config.model_dump(mode="json", exclude={"out", "checkpoint_every"})
    checkpoints = StageCheckpoints(
        config.out / "checkpoints", settings, every=config.checkpoint_every, grows="denoiser.updates"
    )
    saved = checkpoints.newest() if resume else checkpoints.clear()
    with contextlib.nullcontext(progress) if progress else console_progress() as report:
        pictures_NCHW, captions = stages.pictures(config)
        parts = components(config)

        first = stages.Stage("autoencoder", parts.vae, config.autoencoder, saved)
        _train(first, stages.autoencoder_loss(parts.vae, pictures_NCHW, config), {}, checkpoints, report)
        first.keep_average()
        latents_NCHW = stages.standardise(parts.vae, pictures_NCHW)

        both = torch.nn.ModuleDict({"unet": parts.unet, "text_encoder": parts.text_encoder})
        second = stages.Stage("denoiser", both, config.denoiser, saved)
        tokens_NL, empty_1L = tokenise(parts.tokenizer, captions), tokenise(parts.tokenizer, [""])
        path = VariancePreserving(parts.scheduler.alphas_cumprod)
        loss = stages.denoiser_loss(both, latents_NCHW, tokens_NL, empty_1L, path, config)
        _train(second, loss, first.state(), checkpoints, report)
        second.keep_average()
    return write_pipeline(parts, config.out / "policy")


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
