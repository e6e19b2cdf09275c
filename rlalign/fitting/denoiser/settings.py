"""Settings of a pretraining run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlalign.core.locations import NamesFile
from rlalign.data.mazes.maps import MazeName

Task = Literal["shapes", "words", "motion", "mazes"]
"""The embedded tasks; a module of each is in data/."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Optimisation(_Settings):
    """How one of the two networks is trained: AdamW, linear warm-up, then a constant rate."""

    updates: int = Field(ge=1, description="optimiser updates")
    batch: int = Field(ge=1, description="pictures per update")
    lr: float = Field(gt=0.0, description="learning rate")
    warmup: int = Field(default=50, ge=0, description="updates over which the rate rises from 0")
    ema_decay: float = Field(
        ge=0.0, lt=1.0, description="decay of the averaged weights, which are kept"
    )


class Autoencoder(Optimisation):
    """Stage 1: pictures to latents of a quarter of the area and back."""

    updates: int = Field(default=2000, ge=1, description="optimiser updates")
    batch: int = Field(default=32, ge=1, description="pictures per update")
    lr: float = Field(default=2.0e-3, gt=0.0, description="learning rate")
    ema_decay: float = Field(
        default=0.99, ge=0.0, lt=1.0, description="decay of the averaged weights, which are kept"
    )
    source: Annotated[str, NamesFile(never="tiny")] = Field(
        default="",
        description=(
            "pipeline folder whose autoencoder is taken as it is, or tiny; empty trains one"
        ),
    )
    still_updates: int = Field(
        default=0,
        ge=0,
        description="clips: of the updates, how many of the first see single frames",
    )
    kl: float = Field(
        default=1.0e-4, ge=0.0, description="weight of the KL to N(0, 1), nats per latent element"
    )
    channels: tuple[int, int] = Field(
        default=(16, 32),
        description=(
            "widths of its levels, multiples of 8; of clips: the first, and a multiple of it"
        ),
    )

    @model_validator(mode="after")
    def _taken_or_trained(self) -> Autoencoder:
        others = sorted(self.model_fields_set - {"source"})
        if self.source and others:
            raise ValueError(
                f"{others[0]} has no meaning where source takes a trained one; leave one of"
                " them out"
            )
        return self


_FOREIGN = {
    "unet": {"width", "layers", "levels"},
    "transformer": {"channels"},
    "planner": {"channels", "levels", "caption_dropout", "text_width", "text_layers"},
}
"""Family -> settings that are none of its own."""


class Denoiser(Optimisation):
    """Stage 2: the denoiser, and the text encoder (transformer: two) that is trained with it."""

    updates: int = Field(default=2000, ge=1, description="optimiser updates")
    batch: int = Field(default=64, ge=1, description="latents per update")
    lr: float = Field(default=1.0e-3, gt=0.0, description="learning rate")
    ema_decay: float = Field(
        default=0.995, ge=0.0, lt=1.0, description="decay of the averaged weights, which are kept"
    )
    family: Literal["unet", "transformer", "planner"] = Field(
        default="unet",
        description=(
            "epsilon-predicting UNet (Stable Diffusion), flow-matching transformer (SD3; of clips:"
            " Wan), or epsilon-predicting convolutions along plans"
        ),
    )
    caption_dropout: float = Field(
        default=0.1, ge=0.0, le=1.0, description="share of empty captions, for guidance"
    )
    channels: tuple[int, int, int] = Field(
        default=(32, 64, 64), description="unet: widths of its levels, multiples of 16"
    )
    width: int = Field(
        default=96,
        ge=16,
        multiple_of=8,
        description="transformer: its width, a multiple of 16 (of clips: of 24); planner: of 8",
    )
    layers: int = Field(default=6, ge=1, description="transformer, planner: its blocks")
    levels: Literal["uniform", "logit_normal"] = Field(
        default="logit_normal",
        description="transformer: how noise levels are drawn (Esser 2024, section 3.1)",
    )
    text_width: int = Field(
        default=64, ge=4, multiple_of=4, description="width of each text encoder"
    )
    text_layers: int = Field(default=2, ge=1, description="layers of each text encoder")

    @model_validator(mode="after")
    def _of_its_family(self) -> Denoiser:
        foreign = _FOREIGN[self.family]
        for name in sorted(foreign & self.model_fields_set):
            raise ValueError(f"{name} is no setting of family {self.family}; leave it out")
        return self


class Classifier(Optimisation):
    """In place of stage 2: a noise-aware classifier of caption facts, for classifier guidance."""

    updates: int = Field(default=2000, ge=1, description="optimiser updates")
    batch: int = Field(default=64, ge=1, description="latents per update")
    lr: float = Field(default=2.0e-3, gt=0.0, description="learning rate")
    ema_decay: float = Field(
        default=0.995, ge=0.0, lt=1.0, description="decay of the averaged weights, which are kept"
    )
    width: int = Field(default=48, ge=8, multiple_of=8, description="channels of its layers")


_OF_ONE_TASK = {
    "misspelt": "words",
    "wrong_motion": "motion",
    "mazes": "mazes",
    "horizon": "mazes",
}
"""Setting -> the only task that it belongs to."""


class Pretrain(_Settings):
    """Settings of a pretraining run.

    ``out`` is the run folder: ``checkpoints/`` to resume from, and ``policy/``, which plain
    diffusers loads (a planner's: policy ``planner``).
    """

    seed: int = Field(
        default=0, ge=0, description="decides the pictures, the first weights and all noise"
    )
    out: Path = Field(default=Path("runs/pretrain"), description="run folder")
    task: Task = Field(
        default="shapes",
        description=(
            "what is drawn: coloured shapes, one short word, or clips of moving shapes; or plans"
            " through mazes"
        ),
    )
    images: int = Field(
        default=16000, ge=1, description="pictures drawn from the train split; plans"
    )
    faded: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="share of washed-out pictures, as in any corpus of mixed quality",
    )
    misspelt: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="words: share of pictures with one or two wrong letters",
    )
    wrong_motion: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="motion: share of clips that move otherwise than their captions say",
    )
    mazes: tuple[MazeName, ...] = Field(
        default=("umaze", "medium"), min_length=1, description="mazes: which of them are shown"
    )
    horizon: int = Field(default=32, ge=3, description="mazes: way points of a plan")
    autoencoder: Autoencoder = Autoencoder()
    denoiser: Denoiser = Denoiser()
    classifier: Classifier | None = Field(
        default=None,
        description="trains this, on the latents of autoencoder.source, in place of a denoiser",
    )
    checkpoint_every: int = Field(default=250, ge=1, description="updates between two checkpoints")

    @model_validator(mode="after")
    def _of_its_task(self) -> Pretrain:
        for field, task in _OF_ONE_TASK.items():
            if self.task != task and field in self.model_fields_set:
                raise ValueError(
                    f"{field} has no meaning where the task is {self.task}; leave it out"
                )
        if self.task != "motion" and self.autoencoder.still_updates:
            raise ValueError(
                f"autoencoder.still_updates has no meaning where the task is {self.task}; leave it"
                " out"
            )
        needed = {"motion": "transformer", "mazes": "planner"}.get(self.task)
        if needed and self.denoiser.family != needed:
            raise ValueError(
                f"denoiser.family must be {needed} where the task is {self.task}, got"
                f" {self.denoiser.family}"
            )
        if needed != "planner" and self.denoiser.family == "planner":
            raise ValueError(
                f"denoiser.family must be unet or transformer where the task is {self.task}, got"
                " planner"
            )
        if self.task == "mazes":
            for field in sorted({"autoencoder", "faded"} & self.model_fields_set):
                raise ValueError(f"{field} has no meaning where the task is mazes; leave it out")
        of = {"motion": 24, "mazes": 8}.get(self.task, 16)
        if self.denoiser.width % of:
            raise ValueError(
                f"denoiser.width must be a multiple of {of} where the task is {self.task}, got"
                f" {self.denoiser.width}"
            )
        if self.task != "shapes" and self.classifier is not None:
            raise ValueError(
                f"classifier must be trained on shapes, whose facts it tells, got task {self.task}"
            )
        return self

    @model_validator(mode="after")
    def _classifier_alone(self) -> Pretrain:
        if self.classifier is not None and "denoiser" in self.model_fields_set:
            raise ValueError(
                "denoiser has no meaning where a classifier is trained; leave one of them out"
            )
        if self.classifier is not None and not self.autoencoder.source:
            raise ValueError(
                "autoencoder.source must name a trained one where a classifier is trained, got '';"
                " try tiny"
            )
        return self
