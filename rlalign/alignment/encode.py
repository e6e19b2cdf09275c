"""Writing the words of a run's prompts into a file, so that no process needs text encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from rlalign.config import Run
from rlalign.core.registry import UserError
from rlalign.data.pairs.reader import open_pairs_of
from rlalign.data.prompts.base import walk_texts
from rlalign.networks.embeddings import (
    EmbeddingsFile,
    RefusedFile,
    Row,
    key_of,
    row_bytes,
    write_embeddings,
)
from rlalign.policies.base import PipelineRecipe, PolicyRecipe


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a file of embeddings has."""

    texts: int
    """Texts that the prompts ask for: captions, the empty one, what guidance goes away from."""
    new: int
    """Of these, the ones that were encoded now."""
    bytes: int
    """Of one text's words."""


def prompts_of(run: Run) -> list[str]:
    """Every prompt that a run may ask for: its source's, the evaluation's, its set's captions, of
    votes those that there are now."""
    held_out = [str(prompt) for _, prompt in run.prompts.held_out(run.evaluate.prompts)]
    pairs = run.preferences
    captions = [] if pairs is None else open_pairs_of(pairs, run.seed).captions
    return list(dict.fromkeys(chain(walk_texts(run.prompts.pool()), held_out, captions)))


def encode_prompts(
    recipe: PolicyRecipe,
    prompts: Iterable[str],
    file: Path,
    device: str,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Written:
    """Writes the words of prompts on a device, as the policy would have them there. What the file
    has already is kept; text encoders are loaded where it lacks something.

    Raises UserError for a policy without text encoders, and for a file of another model. ``tell``
    hears how many texts are done, of how many.
    """
    if not isinstance(recipe, PipelineRecipe):
        raise UserError(
            f"policy.name must be one of a diffusers pipeline, which has text encoders, got"
            f" {recipe.name!r}"
        )

    # what the words are made by, and what is there already
    alone = recipe.model_copy(update={"embeddings": ""})
    family = alone.build_parts(device, frozenset())
    model = dict(family.makers_of_words())
    before = _open_before(file, model)
    encoder = None
    if before is None:
        encoder = recipe.load_encoder(device)
        some = _read(encoder, "")
    else:
        some = before.row(next(iter(before.keys)))

    # the texts that prompts come to, and their words
    texts = _texts(family, [*prompts, ""], some)
    rows = {} if before is None else {key: partial(before.row, key) for key in before.keys}
    new = [text for text in texts if key_of(model, text) not in rows]
    if new and encoder is None:
        encoder = recipe.load_encoder(device)
    rows |= {key_of(model, text): partial(_read, encoder, text) for text in new}
    if new:
        write_embeddings(file, model, rows, lambda done: tell(done, len(rows)))
    return Written(texts=len(texts), new=len(new), bytes=row_bytes(some))


def _open_before(file: Path, model: dict[str, str]) -> EmbeddingsFile | None:
    """A file that is there already. Raises UserError for another model's."""
    if not file.exists():
        return None
    try:
        return EmbeddingsFile(file, model)
    except RefusedFile as error:
        raise UserError(
            f"{file} is there already, and {error.reason}; name another file, or remove it"
        ) from error


@torch.no_grad()
def _read(encoder: Any, text: str) -> Row:
    return encoder.read(text)


def _texts(family: Any, prompts: Iterable[str], some: Row) -> list[str]:
    """The texts that a family reads for prompts; nothing is encoded. ``some`` are the words of any
    text."""
    stand_in = {name: t.new_zeros((1,) * t.ndim) for name, t in some.items()}
    found: dict[str, None] = {}

    def note(text: str) -> Row:
        found[text] = None
        return stand_in

    family.reader = note
    for prompt in prompts:
        family.encode([prompt])
    return list(found)
