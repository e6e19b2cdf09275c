"""Whether the files of a pipeline folder are there and whole, before anything is loaded: said at
once, where a worker would after minutes, and by name, which the libraries may leave out."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlalign.core.registry import UserError
from rlalign.networks.pipelines.loading import (
    INDEX,
    SHARD,
    WEIGHTS,
    broken,
    read_index,
    tensor_names,
    variant_of,
)

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "*.model")
"""Files that the words of a tokenizer may come from."""


def check_files(
    path: str, classes: Sequence[str], denoiser: str, unread: Container[str] = ()
) -> None:
    """Refuses a pipeline folder of none of ``classes``, without a part that its index names, or
    with a file that is damaged.

    Headers of weights are read, and JSON; nothing of the parts ``unread``. Weights must be there of
    the part ``denoiser`` alone: others may not be asked for. What is no folder here is left to
    loading. Raises UserError.
    """
    folder = Path(path)
    if not (folder / INDEX).is_file():
        return
    rule = f"policy.path: cannot load {path!r}"
    _, index = read_index(folder, path, classes)
    for part, kind in index.items():
        if kind == [None, None] or part in unread:
            continue
        inner = folder / part
        if not inner.is_dir():
            raise UserError(
                f"{rule}: it has no folder {part}, which its {INDEX} names; name a complete one"
            )
        names = sorted(f.name for f in inner.iterdir() if not f.name.startswith("."))
        for name in names:
            if name.endswith(".json"):
                _read_json(inner / name, rule)
        if part.startswith("tokenizer"):
            _check_vocabulary(inner, rule)
        _check_weights(inner, names, rule, must_be_there=part == denoiser)


def _read_json(file: Path, rule: str) -> Any:
    """What a JSON file says; of a config or an index, settings by name."""
    place = f"{file.parent.name}/{file.name}"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise broken(rule, error, place) from error
    if not isinstance(found, Mapping) and ("config" in file.name or ".index." in file.name):
        raise UserError(
            f"{rule}: {place} must be settings by name, got {type(found).__name__}; is the folder"
            " complete and undamaged?"
        )
    return found


def _check_vocabulary(folder: Path, rule: str) -> None:
    if any(next(folder.glob(pattern), None) for pattern in VOCABULARIES):
        return
    raise UserError(
        f"{rule}: its {folder.name} is incomplete: it has none of {', '.join(VOCABULARIES)}; is the"
        " folder complete and undamaged?"
    )


def _check_weights(folder: Path, names: Sequence[str], rule: str, *, must_be_there: bool) -> None:
    """The files of weights that would be read: all shards that an index names, each as long as its
    header says."""
    variant = variant_of(names)
    found = [name for name in names if _variant(name) == (variant,)]
    if must_be_there and not found:
        raise UserError(
            f"{rule}: {folder.name} has no weights, a .safetensors file or shards with their index;"
            " name a complete folder"
        )
    for name in found:
        tensor_names(folder / name, f"{rule}: {folder.name}/{name}")

    # an index of a variant that was left out says nothing
    for name in names:
        if ".safetensors.index." not in name:
            continue
        places = _read_json(folder / name, rule).get("weight_map")
        if not isinstance(places, Mapping):
            raise UserError(
                f"{rule}: {folder.name}/{name} has no weight_map, tensors and their files; is the"
                " folder complete and undamaged?"
            )
        wanted = sorted({str(place) for place in places.values()})
        missing = [place for place in wanted if place not in names]
        if missing and len(missing) < len(wanted):
            raise UserError(
                f"{rule}: {folder.name} lacks {missing[0]}, which {name} names; name a complete"
                " folder"
            )


def _variant(name: str) -> tuple[str | None, ...]:
    """The variant of a file of weights, alone in a tuple; () for any other file."""
    match = WEIGHTS.fullmatch(name)
    if match is None:
        return ()
    return (SHARD.sub("", match["words"] or "").removeprefix(".") or None,)
