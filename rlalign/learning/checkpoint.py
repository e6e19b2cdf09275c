"""Saving and resuming a run: one folder per checkpoint, safetensors and JSON, written whole or not
at all.

``checkpoints/round-00010/`` holds ``state.safetensors`` (every tensor that the next update depends
on) and ``state.json`` (round, statistics, the run's identity, and one checksum over both files).
Of learners that hold a part of the tensors each, every one writes a file of its own beside
``state.json``, which has their checksums (``shard_files.py``); any number of learners resumes from
either. Randomness needs no state: it is keyed.
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
import torch.distributed as group
from pydantic import BaseModel, ConfigDict, Field

from rlalign.core.files import replacing, sync_folder, write_durably
from rlalign.core.registry import UserError
from rlalign.learning.shard_files import ShardFiles, damage, write_together
from rlalign.networks.shares import are_shares

FORMAT = "rlalign checkpoint 1"
IN_SHARDS = "rlalign checkpoint 1 in shards"
_UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
)
LEARNER_LOCK = ".lock"
DRIVER_LOCK = ".driver"
_NAME = re.compile(r"round-(\d{5,})")


class CheckpointSettings(BaseModel):
    """When a run saves itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(
        default=5, ge=1, description="rounds between checkpoints; the last round always makes one"
    )
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

    ``rounds`` may be extended; names, placement, checkpoint and evaluation settings, sinks, what is
    written beside or decoded by how many threads, and where the words of prompts come from do not
    touch the weights. Over which processes a denoiser is spread does by rounding alone, where it is
    trained: ``learner.shard`` and the number of learners may change all the same.
    """
    kept = dict(resolved)
    if "write_pairs" in kept:
        kept["write_pairs"] = ""
    if kept.get("preferences"):
        kept["preferences"] = _free_of_patience({**kept["preferences"], "workers": 0})
    if kept.get("refit"):
        refitted = _free_of_patience({**kept["refit"]["preferences"], "workers": 0})
        kept["refit"] = {**kept["refit"], "preferences": refitted}
    if "shard" in kept.get("learner", {}):
        kept["learner"] = {n: v for n, v in kept["learner"].items() if n != "shard"}
    if "embeddings" in kept.get("policy", {}):
        kept["policy"] = {n: v for n, v in kept["policy"].items() if n != "embeddings"}
    return plain_identity(kept)


def _free_of_patience(preferences: Mapping[str, Any]) -> Mapping[str, Any]:
    """Preferences whatever the time that a round waits for votes."""
    if not preferences.get("ballots"):
        return preferences
    return {**preferences, "ballots": {**preferences["ballots"], "patience_seconds": 0.0}}


def plain_identity(resolved: Mapping[str, Any]) -> str:
    """The digest in checkpoints of before ``write_pairs`` and ``preferences.workers`` might change:
    it holds them too."""
    kept = {
        k: v
        for k, v in resolved.items()
        if k not in ("name", "rounds", "runtime", "checkpoint", "evaluate", "log")
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def save(run_folder: Path, checkpoint: Checkpoint, *, run_identity: str, keep: int) -> Path:
    """Writes a checkpoint atomically, then removes all but the newest ``keep``. Where other
    processes hold parts of its tensors, all of them have to ask."""
    target = folder_of(run_folder, checkpoint.round)
    state = {"run": run_identity, "round": checkpoint.round, "facts": checkpoint.facts}
    state = json.loads(json.dumps(state))
    with disk_errors(run_folder):
        if are_shares(checkpoint.tensors.values()):
            _save_together(target, checkpoint.tensors, {"format": IN_SHARDS, **state})
            if group.get_rank():
                return target
        else:
            _save_alone(target, checkpoint.tensors, {"format": FORMAT, **state})

    # older ones go last
    for old in _rounds(run_folder)[:-keep]:
        shutil.rmtree(folder_of(run_folder, old))
    return target


def _save_alone(
    target: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    from safetensors.torch import save as to_bytes

    # the facts, with a checksum over them and the tensors
    blob = to_bytes({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
    state = {**state, "sha256": _checksum(blob, state)}

    # the files are on the disk before the folder has its name, and the name before an older goes
    _sweep(target.parent)
    with replacing(target) as scratch:
        scratch.mkdir(parents=True)
        write_durably(scratch / "state.safetensors", blob)
        _write_state(scratch, state)
    sync_folder(target.parent)


def _save_together(
    target: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """The same by all processes of torch's group: the first makes the folder and gives it its name,
    each writes what it holds."""
    is_first = group.get_rank() == 0
    with contextlib.ExitStack() as stack:
        told: list[Path | None] = [None]
        if is_first:
            _sweep(target.parent)
            made = stack.enter_context(replacing(target))
            made.mkdir(parents=True)
            told = [made]
        group.broadcast_object_list(told, src=0)
        scratch = told[0]
        assert scratch is not None, "the first process has told it"
        state = {**state, "files": write_together(scratch, tensors)}
        if is_first:
            _write_state(scratch, {**state, "sha256": _checksum(b"", state)})
    if is_first:
        sync_folder(target.parent)
    # it is there for every process that goes on
    group.barrier()


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    write_durably(folder / "state.json", json.dumps(state, indent=1).encode())
    sync_folder(folder)


def latest(run_folder: Path, *, run_identity: str, older: str = "") -> Checkpoint | None:
    """The newest checkpoint of a run, or None. A damaged or foreign one is named and refused
    (UserError).

    ``older`` is the run's ``plain_identity``, under which it may have been saved.
    """
    rounds = _rounds(run_folder)
    return _read(folder_of(run_folder, rounds[-1]), (run_identity, older)) if rounds else None


def newest_round(run_folder: Path) -> int:
    """The round of the newest checkpoint; 0 where there is none."""
    return max(_rounds(run_folder), default=0)


def read_tensors(run_folder: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of the newest checkpoint, whatever run made it (for evaluate and export)."""
    return read_newest(run_folder).tensors


class _Under(Mapping[str, torch.Tensor]):
    """The tensors whose names begin with a prefix, without it; each is read when it is asked
    for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
        self._tensors = tensors
        self._prefix = prefix
        self._names = [n.removeprefix(prefix) for n in tensors if n.startswith(prefix)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[f"{self._prefix}{name}"]


def read_weights(run_folder: Path, *kinds: str) -> Mapping[str, torch.Tensor]:
    """The trained weights of the newest checkpoint: the first of these kinds that it has, "average"
    or "policy". Raises UserError where it has none."""
    tensors = read_tensors(run_folder)
    found = (_Under(tensors, f"{kind}/") for kind in kinds)
    weights = next((one for one in found if len(one)), None)
    if weights is None:
        raise UserError(
            f"the newest checkpoint of {run_folder} holds no policy; name another folder"
        )
    return weights


def read_newest(run_folder: Path) -> Checkpoint:
    """The newest checkpoint, whatever run made it. Raises UserError where there is none."""
    rounds = _rounds(run_folder)
    if not rounds:
        raise UserError(
            f"{run_folder} has no checkpoint yet; wait for the first one, or name another folder"
        )
    return _read(folder_of(run_folder, rounds[-1]), None)


def _read(folder: Path, identities: tuple[str, ...] | None) -> Checkpoint:
    # it is a checkpoint, and of this run
    state = _read_state(folder)
    if identities is not None and state.get("run") not in identities:
        raise UserError(
            f"checkpoint {folder} belongs to another run: its settings differ from config.yaml;"
            " start anew in another folder"
        )
    # the checksum is held against all of state.json before any of it is used
    in_shards = state["format"] == IN_SHARDS
    tensors = _read_shards(folder, state) if in_shards else _read_whole(folder, state)
    return Checkpoint(round=int(state["round"]), tensors=tensors, facts=state["facts"])


def _read_state(folder: Path) -> dict[str, Any]:
    """What state.json holds."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
    except FileNotFoundError as error:
        raise damage(folder, "is incomplete: state.json is missing") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damage(folder, "is damaged: state.json is not JSON") from error
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, IN_SHARDS):
        raise damage(folder, f"is foreign: its format must be {FORMAT!r}")
    return state


def _read_whole(folder: Path, state: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    name = "state.safetensors"
    try:
        blob = (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise damage(folder, f"is incomplete: {name} is missing") from error
    if _checksum(blob, state) != state.get("sha256"):
        raise damage(folder, f"is damaged: {name} or state.json does not match the checksum")

    # the checksum fits, so that only safetensors itself can refuse
    try:
        return from_bytes(blob)
    except SafetensorError as error:
        raise damage(folder, f"is damaged: {error}") from error


def _read_shards(folder: Path, state: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """The tensors, each of which is read when it is asked for."""
    if _checksum(b"", state) != state.get("sha256"):
        raise damage(folder, "is damaged: state.json does not match the checksum")
    return ShardFiles(folder, state["files"])


def _checksum(blob: bytes, state: Mapping[str, Any]) -> str:
    """One digest over the tensors and everything that state.json says beside the digest itself."""
    said = json.dumps({k: v for k, v in state.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(blob + said.encode()).hexdigest()


@contextlib.contextmanager
def disk_errors(run_folder: Path) -> Iterator[None]:
    """A full or read-only disk, or a folder that cannot be, becomes one message with the way
    out."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # a run with something to keep goes on, another one starts again
        code, file = _error_of_disk(error)
        if code in _UNWRITABLE:
            is_run = (run_folder / "config.yaml").is_file() and (
                run_folder / "metrics.jsonl"
            ).is_file()
            resumes = is_run or bool(_rounds(run_folder))
            way_out = "give the same command again"
            if resumes:
                way_out = f"go on with: rlalign train --resume {run_folder}"
            raise UserError(
                f"cannot write {file or run_folder}: {os.strerror(code)}; mend that, then {way_out}"
            ) from error
        raise


def _error_of_disk(error: Exception) -> tuple[int, str]:
    """The operating system's number and the file of a failed write; safetensors has the number in
    its text alone."""
    if isinstance(error, OSError):
        return error.errno or 0, error.filename or ""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else 0, ""


@contextlib.contextmanager
def exclusive(
    run_folder: Path, *, lock: str = LEARNER_LOCK, patience_seconds: float = 60.0
) -> Iterator[None]:
    """Only one process writes a run folder: waits for a dying one, then refuses.

    ``lock`` says which of the two that a run on Ray has: its driver, or the learner, which Ray
    starts again where it dies.
    """
    with disk_errors(run_folder):
        run_folder.mkdir(parents=True, exist_ok=True)
        handle = (run_folder / lock).open("a+", encoding="utf-8")

    # wait for whoever has the lock, but not for ever
    with handle:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{run_folder} is being written by process {writer(run_folder, lock)}; stop"
                        " that one first"
                    ) from error
                time.sleep(0.2)
        # say who has it
        with disk_errors(run_folder):
            os.truncate(handle.fileno(), 0)
            os.write(handle.fileno(), str(os.getpid()).encode())
        yield


def writer(run_folder: Path, lock: str = LEARNER_LOCK) -> int | None:
    """The process that writes this run folder, or was the last to."""
    file = run_folder / lock
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return int(text) if text.isdecimal() else None


def _rounds(run_folder: Path) -> list[int]:
    folder = run_folder / "checkpoints"
    found = [_NAME.fullmatch(p.name) for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(m.group(1)) for m in found if m)


def _sweep(folder: Path) -> None:
    """Removes what an interrupted save left behind."""
    for left in folder.glob(".round-*"):
        shutil.rmtree(left, ignore_errors=True)
