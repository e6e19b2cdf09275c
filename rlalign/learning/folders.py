"""What the folder that a command is to write holds: a run, one that never began, somebody's files,
or nothing.

A run has begun with its first line of metrics or its first checkpoint. What a mistake or a stop
leaves before that keeps nobody from giving the same command again. Files that rlalign has not
written are neither deleted nor written over.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from rlalign.core.registry import UserError
from rlalign.learning.checkpoint import DRIVER_LOCK, LEARNER_LOCK, disk_errors, exclusive, folder_of
from rlalign.storage import name_of, publish

BEFORE_ROUND_1 = (
    "config.yaml",
    "control.json",
    "evaluations.jsonl",
    "log.json",
    "metrics.jsonl",
    "preferences/round-00001.parquet",
    "report.html",
    "samples/base.png",
    "samples/round-00000.png",
    "status.json",
    "tensorboard/events.out.tfevents.*",
    "votes.json",
    "wandb/*",
)
"""What a run writes before the line of its first round."""
_SCRATCH = ".unfinished-"


def has_begun(folder: Path) -> bool:
    """Whether the folder holds a run with something to keep: a line of metrics, or a checkpoint."""
    lines = folder / "metrics.jsonl"
    checkpoints = folder_of(folder, 0).parent
    # a half-written line is none
    has_lines = lines.is_file() and b"\n" in lines.read_bytes()
    return has_lines or (checkpoints.is_dir() and any(checkpoints.glob("round-*")))


def never_began(folder: Path) -> bool:
    """Whether all that the folder holds is what a run leaves that came to no round."""
    return _is_ours(folder) and not has_begun(folder) and holds_only(folder, BEFORE_ROUND_1)


def _is_ours(folder: Path) -> bool:
    """Whether a run has been in the folder: a config.yaml alone may be anybody's."""
    if any((folder / lock).is_file() for lock in (DRIVER_LOCK, LEARNER_LOCK)):
        return True
    try:
        said = json.loads((folder / "status.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and {"state", "rounds", "process"} <= said.keys()


def holds_only(folder: Path, own: Sequence[str]) -> bool:
    """Whether every file of the folder is named by one of the patterns ``own``; what is hidden is
    left aside."""
    for path in folder.rglob("*"):
        inside = path.relative_to(folder)
        is_plain_folder = path.is_dir() and not path.is_symlink()
        if is_plain_folder or any(part.startswith(".") for part in inside.parts):
            continue
        if path.is_symlink() or not any(
            fnmatch.fnmatchcase(inside.as_posix(), pattern) for pattern in own
        ):
            return False
    return True


def refuse_what_is_there(folder: Path, way_out: str) -> None:
    """Raises UserError when ``folder`` is a file, or a folder with something in it (hidden files
    aside)."""
    if folder.is_dir():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{name_of(folder)} is not empty; {way_out}")
    elif folder.exists():
        raise UserError(f"{folder} is a file and must be a folder; {way_out}")


def refuse_for_new_run(folder: Path, way_out: str = "name another with --out DIR") -> None:
    """``refuse_what_is_there`` for a run: a folder in which one never began is as good as an empty
    one."""
    if folder.is_dir() and never_began(folder):
        return
    if has_begun(folder) and (folder / "config.yaml").is_file():
        way_out = (
            f"go on with: rlalign train --resume {name_of(folder)}, or start anew elsewhere with"
            " --out DIR"
        )
    refuse_what_is_there(folder, way_out)


def refuse_for_resume(folder: Path) -> None:
    """Raises UserError where there is no run to go on with."""
    name = name_of(folder)
    place = f"--resume must name a run folder, and {name!r}"
    if not (folder / "config.yaml").is_file():
        if folder.is_dir() and never_began(folder):
            raise UserError(
                f"{place} holds one that never began; start it with: rlalign train CONFIG --out"
                f" {name}"
            )
        raise UserError(f"{place} has no config.yaml")
    if not (has_begun(folder) or _is_ours(folder)):
        raise UserError(
            f"{place} has no round of a run, only a config.yaml; start one with: "
            f"rlalign train {name_of(folder / 'config.yaml')} --out DIR"
        )


@contextlib.contextmanager
def owned(folder: Path, *, resume: bool) -> Iterator[None]:
    """Inside, no other process drives a run in the folder; a new run finds nothing of one that
    never began."""
    begins_again = folder.is_dir() and never_began(folder)
    with exclusive(folder, lock=DRIVER_LOCK):
        if not resume and has_begun(folder):
            raise UserError(
                f"{name_of(folder)} holds a run; go on with: rlalign train --resume"
                f" {name_of(folder)}, or name another folder"
            )
        if not resume and begins_again:
            with disk_errors(folder):
                for pattern in BEFORE_ROUND_1:
                    for path in list(folder.glob(pattern)):
                        if path.is_dir() and not path.is_symlink():
                            shutil.rmtree(path)
                        else:
                            path.unlink()
            publish(folder)
        yield


@contextlib.contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to write in. What it holds moves into ``folder`` when the body ends well; after an
    error nothing does."""
    is_new = not folder.exists()
    scratch = folder / f"{_SCRATCH}{os.getpid()}"

    # what an ended process left behind goes first
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_SCRATCH}*"):
            if not psutil.pid_exists(int(left.name.removeprefix(_SCRATCH))):
                shutil.rmtree(left)
        scratch.mkdir()

    # the files appear only when all of them are written
    try:
        yield scratch
        with disk_errors(folder):
            _move(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_new:
            # there is something in it
            with contextlib.suppress(OSError):
                folder.rmdir()


def _move(source: Path, target: Path) -> None:
    """Moves what a folder holds into another one, folders into those of the same name."""
    for path in sorted(source.iterdir()):
        there = target / path.name
        if path.is_dir() and there.is_dir():
            _move(path, there)
        else:
            os.replace(path, there)
