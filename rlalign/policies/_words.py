"""Where the words of prompts come from in a pipeline's family: text encoders in the process, a file
of embeddings, or another process; each text is read once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field

from rlalign.core.locations import NamesFile
from rlalign.core.registry import Before
from rlalign.diffusion.condition import Words
from rlalign.networks.embeddings import Reader, Row
from rlalign.networks.pipelines.fingerprints import digest_settings, digest_weights, weight_files
from rlalign.networks.pipelines.loading import one_file

REMEMBERED_BYTES = 2**28
"""Of prompts' words that are kept (0.25 MB each in Stable Diffusion 1.5, 5.5 in 3), so that a long
prompt list fills no memory."""
ACTOR = "actor"
"""The value of ``embeddings`` that is no path."""


def _check_embeddings(value: str) -> str:
    if value not in ("", ACTOR) and not value.endswith(".safetensors"):
        raise ValueError(f"must be empty, {ACTOR}, or a .safetensors file")
    return value


Embeddings = Annotated[
    str,
    NamesFile(never=ACTOR),
    Before(""),
    AfterValidator(_check_embeddings),
    Field(
        description=(
            "where prompts' words come from: empty is text encoders in every process, a file is"
            f" what rlalign encode has written, {ACTOR} is one process of the run that encodes for"
            " all"
        )
    ),
]


class PromptMemory:
    """The words of texts, each read once and alone, so that its numbers do not depend on its
    neighbours. Replicas share it: text encoders and tokenizers are used by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.rows: dict[str, Row] = {}
        self._bytes = 0

    def words(self, texts: Sequence[str], read: Reader) -> Words:
        """The rows of all texts; ``read`` gives one row of each tensor."""
        # what is there already is not waited for
        known = [self.rows.get(text) for text in texts]
        rows = [row for row in known if row is not None]
        if len(rows) < len(texts):
            with self._lock:
                rows = [self._row(text, read) for text in texts]
        return Words({name: torch.cat([row[name] for row in rows]) for name in rows[0]})

    def _row(self, text: str, read: Reader) -> Row:
        if text not in self.rows:
            with torch.no_grad():
                row = read(text)
            if self._bytes >= REMEMBERED_BYTES:
                self.rows.clear()
                self._bytes = 0
            self.rows[text] = row
            self._bytes += sum(tensor.nbytes for tensor in row.values())
        return self.rows[text]


def makers_of_words(
    pipeline: Any, location: str, parts: Sequence[str], settings: Mapping[str, str]
) -> dict[str, str]:
    """What the words of a pipeline are made by: name -> a setting, or a digest of one of its
    ``parts``; "" for weights that are not on this machine."""
    folder = Path(pipeline.config["_name_or_path"])
    found = {"pipeline class": type(pipeline).__name__, **settings}
    for name in parts:
        if (folder / name).is_dir():
            found[name] = digest_settings(folder / name)
            if isinstance(getattr(pipeline, name), torch.nn.Module):
                found[f"{name} (weights)"] = digest_weights(weight_files(folder / name))
    if file := one_file(location):
        found["file of weights"] = digest_weights([file])
    return found
