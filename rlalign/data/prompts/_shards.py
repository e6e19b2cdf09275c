"""The files of a list of prompts that is cut into shards, as data sets of the Hugging Face Hub
are."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from rlalign.core.registry import UserError

ENDINGS = ("*.parquet", "*.jsonl", "*.ndjson")
"""What a folder's shards are called: all of the first kind that there is."""
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
"""A word in the name of a file or folder -> the split that it means, as the hub reads names."""


def shards_of(path: str, place: str) -> list[Path]:
    """The files of a path, in the order of their names: the file itself, all shards below a folder,
    or what a glob matches. Hidden files are none.

    Raises UserError where there is none, and for a folder that holds more than one split; ``place``
    is the setting that names it.
    """
    folder = Path(path)
    if folder.is_dir():
        found = _below(folder)
        _refuse_splits(found, folder, place)
    elif glob.has_magic(path) and not folder.exists():
        # as LocalPattern has them: absolute, escapes kept
        found = sorted(Path(one) for one in glob.glob(path, recursive=True))  # noqa: PTH207
        found = [file for file in found if file.is_file() and not file.name.startswith(".")]
    else:
        return [folder]
    if not found:
        raise UserError(
            f"{place} must name a file of prompts, a folder with shards of Parquet or JSON lines,"
            f" or a glob, got {path!r}, where there is none"
        )
    return found


def _below(folder: Path) -> list[Path]:
    for ending in ENDINGS:
        below = [file.relative_to(folder) for file in folder.rglob(ending) if file.is_file()]
        found = [file for file in below if not any(part.startswith(".") for part in file.parts)]
        if found:
            return [folder / file for file in sorted(found)]
    return []


def _refuse_splits(files: Iterable[Path], folder: Path, place: str) -> None:
    """A folder with the prompts of training and of evaluation names neither."""
    example: dict[str, Path] = {}
    for file in files:
        for word in re.split(r"[^a-z]+", str(file.relative_to(folder)).lower()):
            if word in _SPLITS:
                example.setdefault(_SPLITS[word], file)
    if len(example) > 1:
        first = example.get("train", next(iter(example.values())))
        raise UserError(
            f"{place} must name the shards of one split, got {str(folder)!r}, which holds those of"
            f" {' and '.join(sorted(example))}; name a glob, such as {_pattern(first)!r}"
        )


def _pattern(shard: Path) -> str:
    """A glob of the shards that a shard is one of."""
    name, numbered = re.subn(r"\d+(-of-\d+)?", "*", shard.name, count=1)
    return str(shard.with_name(name) if numbered else shard)
