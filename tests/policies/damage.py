"""What can be wrong with a pipeline folder: a change of one file, by what it is a part of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

Damage = Callable[[Path], object]
"""What is done to the folder of a part."""


def copy_linked(folder: Path, place: Path) -> Path:
    """A copy whose files are the folder's own; one that is changed must be written anew."""
    return Path(shutil.copytree(folder, place, copy_function=os.link))


def rewrite(file: Path, blob: bytes) -> None:
    """Writes a file anew, so that the one that it is linked to stays."""
    file.unlink(missing_ok=True)
    file.write_bytes(blob)


def rewrite_json(file: Path, change: Callable[[Any], Any]) -> None:
    """Writes a JSON file anew with what ``change`` makes of it."""
    rewrite(file, json.dumps(change(json.loads(file.read_text()))).encode())


def cut(file: Path) -> None:
    """Keeps the first half of a file."""
    blob = file.read_bytes()
    rewrite(file, blob[: len(blob) // 2])


def weights_of(part: Path) -> Path:
    return next(part.glob("*.safetensors"))


def split(part: Path, variant: str = "") -> list[Path]:
    """Weights in two shards with their index, of a variant (".fp16") or none."""
    whole = weights_of(part)
    tensors = load_file(whole)
    stem = whole.name.removesuffix(".safetensors")
    whole.unlink()
    names = sorted(tensors)
    half = len(names) // 2
    shards: list[Path] = []
    places: dict[str, str] = {}
    for number, own in enumerate((names[:half], names[half:]), start=1):
        shards.append(part / f"{stem}{variant}-{number:05d}-of-00002.safetensors")
        save_file({n: tensors[n] for n in own}, shards[-1], metadata={"format": "pt"})
        places |= dict.fromkeys(own, shards[-1].name)
    index = {"metadata": {"total_size": whole_bytes(tensors)}, "weight_map": places}
    (part / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))
    return shards


def whole_bytes(tensors: dict[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def rename_variant(part: Path) -> None:
    """The weights as a variant's alone."""
    file = weights_of(part)
    file.rename(file.with_suffix(".fp16.safetensors"))


def index_as(kind: list[Any]) -> Damage:
    """Another [library, class] of the part in the pipeline's index."""
    return lambda part: rewrite_json(
        part.parent / "model_index.json", lambda index: {**index, part.name: kind}
    )


def forget_words(part: Path) -> None:
    """A tokenizer's file without a word in it."""

    def change(found: dict[str, Any]) -> dict[str, Any]:
        vocabulary = type(found["model"]["vocab"])()
        return {**found, "model": {**found["model"], "vocab": vocabulary}}

    rewrite_json(part / "tokenizer.json", change)


def plain_words(part: Path, *, without: str = "") -> None:
    """A tokenizer of merged letters in the files that published folders have."""
    model = json.loads((part / "tokenizer.json").read_text())["model"]
    (part / "tokenizer.json").unlink()
    (part / "vocab.json").write_text(json.dumps(model["vocab"]))
    (part / "merges.txt").write_text("#version: 0.2\n")
    if without:
        (part / without).unlink()


NETWORK: dict[str, Damage] = {
    "no folder": shutil.rmtree,
    "no weights": lambda part: weights_of(part).unlink(),
    "weights cut short": lambda part: cut(weights_of(part)),
    "empty weights": lambda part: rewrite(weights_of(part), b""),
    "pickled weights": lambda part: weights_of(part).rename(weights_of(part).with_suffix(".bin")),
    "a shard missing": lambda part: split(part)[1].unlink(),
    "a shard cut short": lambda part: cut(split(part)[0]),
    "a variant's shard missing": lambda part: split(part, ".fp16")[0].unlink(),
    "an index cut short": lambda part: (split(part), cut(next(part.glob("*.index.json")))),
    "an index without places": lambda part: (
        split(part),
        rewrite(next(part.glob("*.index.json")), b"{}"),
    ),
    "a variant cut short": lambda part: (rename_variant(part), cut(weights_of(part))),
    "no config": lambda part: (part / "config.json").unlink(),
    "a config cut short": lambda part: cut(part / "config.json"),
    "a config that is a list": lambda part: rewrite(part / "config.json", b"[]"),
    "another class": index_as(["diffusers", "AutoencoderTiny"]),
    "an unknown class": index_as(["diffusers", "Nowhere"]),
    "left out": index_as([None, None]),
}
TOKENIZER: dict[str, Damage] = {
    "no folder": shutil.rmtree,
    "no vocabulary": lambda part: (part / "tokenizer.json").unlink(),
    "a vocabulary cut short": lambda part: cut(part / "tokenizer.json"),
    "a vocabulary without words": forget_words,
    "a config cut short": lambda part: cut(part / "tokenizer_config.json"),
    "an unknown class": index_as(["transformers", "Nowhere"]),
    "left out": index_as([None, None]),
}
SCHEDULER: dict[str, Damage] = {
    "no folder": shutil.rmtree,
    "no config": lambda part: (part / "scheduler_config.json").unlink(),
    "a config cut short": lambda part: cut(part / "scheduler_config.json"),
    "an unknown class": index_as(["diffusers", "Nowhere"]),
    "left out": index_as([None, None]),
}
ONLY_LOADED = ("no config", "another class", "an unknown class", "left out")
"""What a look at the files does not find: loading does."""


def damages_of(part: str) -> dict[str, Damage]:
    """What can be wrong with a part of this name."""
    if part == "scheduler":
        return SCHEDULER
    return TOKENIZER if part.startswith("tokenizer") else NETWORK
