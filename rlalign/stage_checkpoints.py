"""Checkpoints of a training in stages (pretraining, fitting a reward): one whole one, written atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlalign.registry import UserError


class StageCheckpoints:
    """Checkpoints of one run folder: a safetensors file and a JSON file each, complete or not there.

    Stages are trained in the order of their names. ``settings`` (JSON-able) may not change between a checkpoint and the run
    that goes on from it, but for the number at the dotted path ``grows``, which may grow.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, every: int, grows: str) -> None:
        self.folder, self.every, self.grows = folder, every, grows
        self.settings = json.loads(json.dumps(settings))

    def save(self, stage: str, done: int, state: dict[str, torch.Tensor]) -> None:
        """Writes beside, renames, then deletes what is older: a crash at any moment leaves one whole checkpoint."""
        from safetensors.torch import save_file

        # stages sort in their order, and the number is padded: the newest is the last by name
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
            if mine == its or (key == self.grows and (mine or 0) > (its or 0)):
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
