"""Lists of prompts that stay where they are, and how any list of prompts is walked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import overload

import numpy as np

BATCH = 4096
"""Prompts that are in memory at once where a list is walked."""


class PromptTable(Sequence[str]):
    """Prompts that are read when they are asked for; of the others no more than places in a file
    are in memory.

    ``table[i]`` reads one, ``take`` several at once, which some files need one pass for. Walking
    it reads in batches.
    """

    @abstractmethod
    def take(self, numbers: Sequence[int]) -> list[str]:
        """The prompts of these numbers, in this order, with their records."""

    @abstractmethod
    def batches(self) -> Iterator[list[str]]:
        """Every prompt with its record, in order."""

    def texts(self) -> Iterator[list[str]]:
        """Every prompt's text alone, in order."""
        return self.batches()

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.take([index % len(self)])[0]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.batches())

    def __contains__(self, value: object) -> bool:
        return any(value in batch for batch in self.texts())


class Choice(PromptTable):
    """Some prompts of another list. ``rows`` is (N,) int64, ascending numbers in that list."""

    def __init__(self, of: Sequence[str], rows: np.ndarray) -> None:
        self.of = of
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, numbers: Sequence[int]) -> list[str]:
        return take_rows(self.of, self.rows[list(numbers)].tolist())

    def batches(self) -> Iterator[list[str]]:
        return self._chosen(batches_of(self.of))

    def texts(self) -> Iterator[list[str]]:
        return self._chosen(texts_of(self.of))

    def _chosen(self, batches: Iterator[list[str]]) -> Iterator[list[str]]:
        seen = 0
        for batch in batches:
            first, last = np.searchsorted(self.rows, [seen, seen + len(batch)])
            yield [batch[row - seen] for row in self.rows[first:last].tolist()]
            seen += len(batch)


class Joined(PromptTable):
    """Several lists, one after the other. ``bounds`` are the numbers of each one's first prompt,
    and of one past the last."""

    def __init__(self, pools: Sequence[Sequence[str]]) -> None:
        self.pools = pools
        self.bounds = np.cumsum([0, *map(len, pools)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def of_pool(self, prompt: str, i: int) -> str:
        """A prompt of list ``i`` as it is among the others."""
        return prompt

    def take(self, numbers: Sequence[int]) -> list[str]:
        rows = np.asarray(list(numbers), np.int64)
        found: dict[int, str] = {}
        for i, pool in enumerate(self.pools):
            begin, end = self.bounds[i : i + 2]
            own = np.unique(rows[(rows >= begin) & (rows < end)])
            if len(own):
                prompts = take_rows(pool, (own - begin).tolist())
                found |= zip(own.tolist(), (self.of_pool(p, i) for p in prompts), strict=True)
        return [found[row] for row in rows.tolist()]

    def batches(self) -> Iterator[list[str]]:
        for i, pool in enumerate(self.pools):
            for batch in batches_of(pool):
                yield [self.of_pool(prompt, i) for prompt in batch]

    def texts(self) -> Iterator[list[str]]:
        for pool in self.pools:
            yield from texts_of(pool)


def take_rows(pool: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Prompts of a list by their numbers, in this order."""
    return pool.take(numbers) if isinstance(pool, PromptTable) else [pool[i] for i in numbers]


def batches_of(pool: Sequence[str]) -> Iterator[list[str]]:
    """Every prompt of a list with its record, in order."""
    return pool.batches() if isinstance(pool, PromptTable) else _cut(pool)


def texts_of(pool: Sequence[str]) -> Iterator[list[str]]:
    """Every prompt's text of a list, in order."""
    return pool.texts() if isinstance(pool, PromptTable) else _cut(pool)


def _cut(pool: Sequence[str]) -> Iterator[list[str]]:
    every = iter(pool)
    while batch := list(islice(every, BATCH)):
        yield batch
