"""Weights & Biases."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from rlalign.core.clips import encode_animation
from rlalign.core.pictures import clip_files, join_clips, read_grid
from rlalign.core.registry import UserError
from rlalign.sinks.base import Origin, Sink, Writer


class WandB(Sink):
    """A run of Weights & Biases: metrics over rounds, the evaluation's pictures, the resolved
    settings, and the report as an artefact. Clips play side by side in one GIF, which has 256
    colours a frame; the run folder has them whole.

    The key is WANDB_API_KEY's, or what ``wandb login`` keeps. ``offline`` writes into ``wandb/`` of
    the run folder, for ``wandb sync``. A run that goes on is the same run there; rounds that it
    does again are logged again.

    Source: the package wandb (extra ``wandb``).
    """

    package: ClassVar[str] = "wandb"

    project: str = Field(default="rlalign", min_length=1, description="W&B's project")
    entity: str = Field(default="", description="user or team; W&B's default when empty")
    group: str = Field(default="", description="runs that belong together")
    tags: tuple[str, ...] = Field(default=(), description="words to find the run by")
    mode: Literal["online", "offline"] = Field(
        default="online", description="send at once, or keep for wandb sync"
    )

    def connect(self, origin: Origin) -> Writer:
        import wandb

        # a server that is down is given up soon, unless the user says otherwise
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
        wandb.setup(wandb.Settings(silent=True))
        # a run is no place to ask for a key: nobody may be there
        if self.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError("there is no key; set WANDB_API_KEY, or give the command wandb login")
        number, _ = origin.kept_id("wandb", lambda: secrets.token_hex(4))
        run = wandb.init(
            project=self.project,
            entity=self.entity or None,
            group=self.group or None,
            tags=self.tags or None,
            name=origin.name,
            id=number,
            resume="allow",
            mode=self.mode,
            dir=str(origin.folder),
            config=dict(origin.settings),
            # what a terminal shows stays there
            settings=wandb.Settings(console="off", silent=True),
        )
        # rounds are the axis, since W&B's own step cannot go back to a checkpoint
        run.define_metric("round")
        run.define_metric("*", step_metric="round")
        return _Writer(run, origin.name)


class _Writer:
    """A live run of W&B."""

    def __init__(self, run: Any, name: str) -> None:
        self._run = run
        self._name = name

    def write(self, round: int, values: Mapping[str, float]) -> None:
        self._run.log({"round": round, **values})

    def show(self, round: int, picture: Path) -> None:
        import wandb

        name = "changes" if picture.stem.endswith("changes") else "samples"
        shown: dict[str, Any] = {name: wandb.Image(str(picture))}
        if clip_files(picture):
            # of all formats that W&B plays, Pillow writes this one
            clip = join_clips(read_grid(picture))
            film = io.BytesIO(encode_animation(clip.media_FCHW, "gif", clip.rate))
            shown[f"{name}_clips"] = wandb.Video(film, format="gif")
        self._run.log({"round": round, **shown})

    def keep(self, file: Path) -> None:
        import wandb

        kind = file.stem
        artifact = wandb.Artifact(f"{self._name}-{kind}", type=kind)
        artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def close(self, ended: bool) -> None:
        self._run.finish(exit_code=0 if ended else 1)
