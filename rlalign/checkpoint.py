"""Saving and resuming a run: one folder per checkpoint, safetensors and JSON, written whole or not at all.

``checkpoints/round-00010/`` holds ``state.safetensors`` (every tensor that the next update depends on) and ``state.json``
(round, statistics, the run's identity, and one checksum over both files). Randomness needs no state: it is keyed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from rlalign.registry import UserError

FORMAT = "rlalign checkpoint 1"
_NAME = re.compile(r"round-(\d{5,})")


class CheckpointSettings(BaseModel):
    """When a run saves itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(default=5, ge=1, description="rounds between checkpoints; the last round always makes one")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds."""

    round: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]
    """JSON-able: statistics and counters."""


def folder_of(run_folder: Path, round: int) -> Path:
    """Where the checkpoint of a round lies."""
    return run_folder / "checkpoints" / f"round-{round:05d}"


def identity(resolved: Mapping[str, Any]) -> str:
    """A digest of what may not change between a checkpoint and the run that resumes it.

    ``rounds`` may be extended; names, placement, checkpoint and evaluation settings do not touch the weights.
    """
    kept = {k: v for k, v in resolved.items() if k not in ("name", "rounds", "runtime", "checkpoint", "evaluate")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def save(run_folder: Path, checkpoint: Checkpoint, *, run_identity: str, keep: int) -> Path:
    """Writes a checkpoint atomically, then removes all but the newest ``keep``."""
    from safetensors.torch import save as to_bytes

    target = folder_of(run_folder, checkpoint.round)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    with disk_errors(run_folder):
        _sweep(target.parent)
        scratch.mkdir(parents=True)
        blob = to_bytes({n: t.detach().cpu().contiguous() for n, t in checkpoint.tensors.items()})
        _write(scratch / "state.safetensors", blob)
        state = {"format": FORMAT, "run": run_identity, "round": checkpoint.round, "facts": checkpoint.facts}
        state = json.loads(json.dumps(state))
        state["sha256"] = _checksum(blob, state)
        _write(scratch / "state.json", json.dumps(state, indent=1).encode())
        _sync_folder(scratch)
        if target.exists():
            shutil.rmtree(target)
        os.rename(scratch, target)
        _sync_folder(target.parent)
    for old in _rounds(run_folder)[:-keep]:
        shutil.rmtree(folder_of(run_folder, old))
    return target


def latest(run_folder: Path, *, run_identity: str) -> Checkpoint | None:
    """The newest checkpoint of a run, or None. A damaged or foreign one is named and refused (UserError)."""
    rounds = _rounds(run_folder)
    return _read(folder_of(run_folder, rounds[-1]), run_identity) if rounds else None


def read_tensors(run_folder: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of the newest checkpoint, whatever run made it (for evaluate and export)."""
    rounds = _rounds(run_folder)
    if not rounds:
        raise UserError(f"{run_folder} has no checkpoint yet; wait for the first one, or name another folder")
    return _read(folder_of(run_folder, rounds[-1]), None).tensors


def _read(folder: Path, run_identity: str | None) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    way_out = f"delete {folder} to resume from the one before it"
    try:
        state = json.loads((folder / "state.json").read_bytes())
        blob = (folder / "state.safetensors").read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"checkpoint {folder} is incomplete: {Path(error.filename).name} is missing; {way_out}"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {folder} is damaged: state.json is not JSON; {way_out}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"checkpoint {folder} is foreign: its format must be {FORMAT!r}; {way_out}")
    if run_identity is not None and state.get("run") != run_identity:
        raise UserError(
            f"checkpoint {folder} belongs to another run: its settings differ from config.yaml; start anew in another folder"
        )
    if _checksum(blob, state) != state.get("sha256"):
        raise UserError(
            f"checkpoint {folder} is damaged: state.safetensors or state.json does not match the checksum; {way_out}"
        )
    try:
        tensors = from_bytes(blob)
    except SafetensorError as error:
        raise UserError(f"checkpoint {folder} is damaged: {error}; {way_out}") from error
    return Checkpoint(round=int(state["round"]), tensors=tensors, facts=state["facts"])


def _checksum(blob: bytes, state: Mapping[str, Any]) -> str:
    """One digest over the tensors and everything that state.json says beside the digest itself."""
    said = json.dumps({k: v for k, v in state.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(blob + said.encode()).hexdigest()


@contextlib.contextmanager
def disk_errors(run_folder: Path) -> Iterator[None]:
    """A full or read-only disk becomes one message with the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise UserError(
                f"cannot write {error.filename or run_folder}: {os.strerror(error.errno)}; "
                f"mend that, then go on with: rlalign train --resume {run_folder}"
            ) from error
        raise


@contextlib.contextmanager
def exclusive(run_folder: Path, *, patience_seconds: float = 60.0) -> Iterator[None]:
    """Only one process writes a run folder: waits for a dying one, then refuses."""
    with disk_errors(run_folder):
        run_folder.mkdir(parents=True, exist_ok=True)
        handle = (run_folder / ".lock").open("a+")
    with handle:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{run_folder} is being written by process {writer(run_folder)}; stop that one first"
                    ) from error
                time.sleep(0.2)
        with disk_errors(run_folder):
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
        yield


def writer(run_folder: Path) -> int | None:
    """The process that writes this run folder, or was the last to."""
    lock = run_folder / ".lock"
    text = lock.read_text() if lock.is_file() else ""
    return int(text) if text.isdigit() else None


def _rounds(run_folder: Path) -> list[int]:
    folder = run_folder / "checkpoints"
    found = [_NAME.fullmatch(p.name) for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(m.group(1)) for m in found if m)


def _sweep(folder: Path) -> None:
    """Removes what an interrupted save left behind."""
    for left in folder.glob(".round-*"):
        shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    _write(scratch, text.encode())
    os.replace(scratch, path)


def _write(path: Path, blob: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(blob)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
