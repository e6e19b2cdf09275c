"""What a source of prompts is, and how prompts become units of work."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from rlalign.core.prompts import record_of
from rlalign.core.records import Plan, Unit, UnitKey
from rlalign.core.registry import Recipe
from rlalign.data.prompts._table import take_rows, texts_of
from rlalign.diffusion.noise import generator


def prompt_id(prompt: str) -> int:
    """A stable number of a prompt, in [0, 2^63): of its text, and of its record where it has
    one."""
    record = record_of(prompt)
    # no text holds a NUL
    said = "\0" + json.dumps(dict(record), sort_keys=True) if record else ""
    return _number(f"{prompt}{said}")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Prompts(Recipe):
    """Base of a source: how many prompts a round takes, and how they are dealt to units."""

    shelf: ClassVar[str] = "prompts"

    per_round: int = Field(default=16, ge=1, description="prompts in a round")
    samples_per_prompt: int = Field(default=4, ge=1, description="samples of each prompt")
    per_unit: int = Field(
        default=4, ge=1, description="prompts in one unit of work; must divide per_round"
    )

    @model_validator(mode="after")
    def _deals_evenly(self) -> Prompts:
        if self.per_round % self.per_unit:
            raise ValueError(
                f"per_unit must divide per_round ({self.per_round}), got {self.per_unit}"
            )
        return self

    def pool(self) -> Sequence[str]:
        """Every prompt that may be trained on."""
        raise NotImplementedError

    def held_out(self, count: int) -> list[tuple[int, str]]:
        """``count`` fixed (id, prompt) for evaluation, disjoint from the pool where the source
        can."""
        raise NotImplementedError

    def held_out_pool(self) -> Sequence[str] | None:
        """Every prompt that is kept for evaluation apart from the pool; None where evaluation takes
        the pool's own, or they are disjoint by what they are."""
        return None

    def find_overlap(self) -> Overlap | None:
        """Prompts that are kept for evaluation and stand in the pool too; None where there are
        none. Walks the pool once, by 64-bit numbers of its texts."""
        held_out = self.held_out_pool()
        return None if held_out is None else _overlap(held_out, self.pool())

    def draw(self, seed: int, round: int) -> list[tuple[int, str]]:
        """The (id, prompt) of a round: without replacement while the pool lasts, by (seed, round)
        alone."""
        pool = self.pool()
        order = generator("prompts", seed, round)
        chosen: list[int] = []
        while len(chosen) < self.per_round:
            chosen += order.permutation(len(pool))[: self.per_round - len(chosen)].tolist()
        return [(prompt_id(prompt), prompt) for prompt in take_rows(pool, chosen)]

    def units(self, seed: int, round: int, plan: Plan) -> list[Unit]:
        """The units of a training round. A prompt that is drawn twice gets samples of its own each
        time."""
        drawn = self.draw(seed, round)
        used: dict[int, int] = {}
        rows: list[tuple[int, str, int]] = []
        for number, text in drawn:
            first = used.get(number, 0)
            used[number] = first + self.samples_per_prompt
            last = first + self.samples_per_prompt
            rows += [(number, text, sample) for sample in range(first, last)]
        size = self.per_unit * self.samples_per_prompt
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [
            Unit.of_rows(UnitKey("train", round, index), part, seed, plan)
            for index, part in enumerate(parts)
        ]


def first_of(prompts: Sequence[str], count: int) -> list[tuple[int, str]]:
    """The first ``count`` prompts with their ids, starting over when there are fewer."""
    first = take_rows(prompts, range(min(count, len(prompts))))
    numbered = [(prompt_id(prompt), prompt) for prompt in first]
    return [numbered[i % len(numbered)] for i in range(count)]


def walk_texts(prompts: Sequence[str]) -> Iterator[str]:
    """The text of every prompt of a pool, in order, without holding a long one in memory."""
    return map(str, chain.from_iterable(texts_of(prompts)))


def split_by_text(prompts: Sequence[str], share: float) -> np.ndarray:
    """(N,) bool: the prompts that a share holds out, by the hash of each one's text alone: equal
    texts fall on one side, in every file."""
    codes = (zlib.crc32(text.encode()) for text in walk_texts(prompts))
    number_N = np.fromiter(codes, np.uint32, len(prompts))
    # the finaliser of MurmurHash3: a CRC of similar texts alone is not spread evenly
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        number_N = (number_N ^ (number_N >> np.uint32(shift))) * np.uint32(factor)
    return (number_N ^ (number_N >> np.uint32(16))) < share * 2**32


# --- prompts on both sides -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Prompts that are kept for evaluation and trained on as well, compared by their texts."""

    count: int
    of: int
    """Texts that are kept for evaluation."""
    example: str

    def __str__(self) -> str:
        return (
            f"{self.count:,} of {self.of:,} held-out prompts are trained on as well, such as"
            f" {self.example!r}"
        )


def _overlap(held_out: Sequence[str], pool: Sequence[str]) -> Overlap | None:
    held_N = np.unique(np.concatenate(list(_hashes(held_out)) or [np.empty(0, np.int64)]))
    is_trained = np.zeros(len(held_N), bool)
    example = ""
    for texts in texts_of(pool):
        hash_B = _hash_texts(texts)
        inside = np.isin(hash_B, held_N)
        if inside.any():
            is_trained[np.searchsorted(held_N, hash_B[inside])] = True
            example = example or texts[int(np.argmax(inside))]
    count = int(is_trained.sum())
    return Overlap(count=count, of=len(held_N), example=str(example)) if count else None


def _hashes(prompts: Sequence[str]) -> Iterator[np.ndarray]:
    return map(_hash_texts, texts_of(prompts))


def _hash_texts(texts: Sequence[str]) -> np.ndarray:
    """(B,) int64: Python's own hashes, which are equal within this process alone."""
    return np.fromiter(map(hash, texts), np.int64, len(texts))
