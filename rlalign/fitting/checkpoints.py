"""Checkpoints of a training in stages (pretraining, fitting a reward): one whole one, written
atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlalign.core.files import replacing
from rlalign.core.finite import all_finite
from rlalign.core.registry import UserError


class StageCheckpoints:
    """Checkpoints of one run folder: a safetensors file and a JSON file each, complete or not
    there.

    Stages are trained in the order of their names. ``settings`` (JSON-able) may not change between
    a checkpoint and the run that goes on from it, but for the number at the dotted path ``grows``,
    which may grow.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, every: int, grows: str
    ) -> None:
        self.folder, self.every, self.grows = folder, every, grows
        self.settings = json.loads(json.dumps(settings))

    def save(self, stage: str, done: int, state: dict[str, torch.Tensor]) -> None:
        """Writes beside, renames, then deletes what is older: a crash at any moment leaves one
        whole checkpoint."""
        from safetensors.torch import save_file

        # stages sort in their order, and the number is padded: the newest is the last by name
        final = self.folder / f"{stage}-{done:08d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(final) as scratch:
            scratch.mkdir()
            save_file(state, scratch / "state.safetensors")
            text = json.dumps({"stage": stage, "done": done, "settings": self.settings}, indent=2)
            (scratch / "checkpoint.json").write_text(text, encoding="utf-8")
        # older ones, and what a killed process left
        for other in self.folder.glob("*-*"):
            if other != final:
                shutil.rmtree(other)

    def newest(self) -> dict[str, torch.Tensor]:
        """The state to go on from; empty when there is none."""
        from safetensors.torch import load_file

        if not self._all():
            return {}
        folder = self._all()[-1]
        self._compare(
            json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))["settings"]
        )
        return load_file(folder / "state.safetensors")

    def clear(self) -> dict[str, torch.Tensor]:
        """Deletes every checkpoint; the state to start from is empty."""
        for folder in self._all():
            shutil.rmtree(folder)
        return {}

    def _all(self) -> list[Path]:
        whole = [p for p in self.folder.glob("[!.]*-*") if p.suffix != ".tmp"]
        return sorted(whole)

    def _compare(self, saved: dict[str, Any]) -> None:
        ours = _flat(self.settings)
        theirs = _flat(saved)
        for key in sorted(ours.keys() | theirs.keys()):
            mine = ours.get(key)
            its = theirs.get(key)
            if mine == its or (key == self.grows and (mine or 0) > (its or 0)):
                continue
            raise UserError(
                f"{key} must stay {its!r} to resume from {self.folder}, got {mine!r}; choose"
                " another out, or start anew"
            )


def own_part(saved: Mapping[str, torch.Tensor], stage: str) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of one stage, by names without the stage's."""
    prefix = f"{stage}/"
    return {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's moments and counts as tensors with names."""
    state = {}
    for index, slots in optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{index}/{slot}": value for slot, value in slots.items()}
    return state


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, torch.Tensor]) -> None:
    """The inverse of ``optimizer_state``; other names are left aside."""
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer/"):
            _, index, slot = key.split("/")
            slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def refuse_gradient(norm: torch.Tensor, stage: str, done: int) -> None:
    """Raises UserError for a gradient whose norm is not finite."""
    if not all_finite(norm):
        raise UserError(
            f"{stage}: the gradient is not finite (NaN or infinity) after {done} updates; lower"
            f" {stage}.lr"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted path."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        inside = isinstance(value, dict)
        result |= _flat(value, f"{prefix}{key}.") if inside else {prefix + key: value}
    return result
