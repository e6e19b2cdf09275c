"""Checkpoints of a pretraining run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from rlalign.pretrain.settings import Pretrain
from rlalign.registry import UserError


class Checkpoints:
    """Checkpoints of one run folder: a safetensors file and a JSON file each, complete or not there."""

    def __init__(self, folder: Path, config: Pretrain) -> None:
        self.folder, self.every = folder, config.checkpoint_every
        self.settings = json.loads(config.model_dump_json(exclude={"out", "checkpoint_every"}))

    def save(self, stage: str, done: int, state: dict[str, torch.Tensor]) -> None:
        """Writes beside, renames, then deletes what is older: a crash at any moment leaves one whole checkpoint."""
        from safetensors.torch import save_file

        # "autoencoder" sorts before "denoiser", and the number is padded: the newest is the last by name
        final = self.folder / f"{stage}-{done:08d}"
        beside = self.folder / f"{final.name}.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(state, beside / "state.safetensors")
        text = json.dumps({"stage": stage, "done": done, "settings": self.settings}, indent=2)
        (beside / "checkpoint.json").write_text(text, encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        for other in self._all():
            if other != final:
                shutil.rmtree(other)

    def newest(self) -> dict[str, torch.Tensor]:
        """The state to go on from; empty when there is none."""
        from safetensors.torch import load_file

        if not self._all():
            return {}
        folder = self._all()[-1]
        self._compare(json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))["settings"])
        return load_file(folder / "state.safetensors")

    def clear(self) -> dict[str, torch.Tensor]:
        """Deletes every checkpoint; the state to start from is empty."""
        for folder in self._all():
            shutil.rmtree(folder)
        return {}

    def _all(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*-*") if p.suffix != ".tmp")

    def _compare(self, saved: dict[str, Any]) -> None:
        ours, theirs = _flat(self.settings), _flat(saved)
        for key in sorted(ours.keys() | theirs.keys()):
            mine, its = ours.get(key), theirs.get(key)
            if mine == its or (key == "denoiser.updates" and (mine or 0) > (its or 0)):
                continue
            raise UserError(
                f"{key} must stay {its!r} to resume from {self.folder}, got {mine!r}; choose another out, or start anew"
            )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted path."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
