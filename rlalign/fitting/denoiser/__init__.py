"""Plain denoising training: the tiny pipelines from drawn pictures, autoencoder first, then
denoiser and text encoder.

    pictures -> autoencoder (L1 + L2 + KL) -> latents, standardised per channel -> denoiser + text
    encoder -> pipeline folder

The denoiser is a UNet that predicts noise (Stable Diffusion's format, ``pipeline.py`` and
``stages.py``) or a flow-matching transformer (Stable Diffusion 3's, ``flow.py``; of clips Wan's,
``video.py``); the autoencoder may be taken from a pipeline that is there already.

Everything random is keyed by (seed, purpose, update), nothing depends on a generator's state: a run
that was stopped anywhere resumes from its checkpoint and ends in the same weights, bit for bit, as
one that was not (same machine, same threads). The learning rate does not depend on how many updates
are to come, so a longer run passes through the shorter one's weights. May import core, data and
diffusion. Another kind of denoiser is another file like ``flow.py``: its parts, its loss, its
pipeline folder.
"""

from __future__ import annotations

from rlalign.core.progress import Report, console_progress
from rlalign.fitting.denoiser.run import pretrain
from rlalign.fitting.denoiser.settings import Autoencoder, Denoiser, Optimisation, Pretrain
from rlalign.fitting.denoiser.stages import denoising_loss

__all__ = [
    "Autoencoder",
    "Denoiser",
    "Optimisation",
    "Pretrain",
    "Report",
    "console_progress",
    "denoising_loss",
    "pretrain",
]
