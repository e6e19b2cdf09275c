"""What a denoiser is told beside the latent: records of named tensors, whatever a model family
calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rlalign.core.registry import UserError


@dataclass(frozen=True)
class Words:
    """Named tensors of B rows, batch first: embeddings, masks, pooled vectors, time ids, a guidance
    scale.

    Names are the family's own. Two of them are read outside it, by ``summary_BD``: ``embeds_BLD``,
    and ``mask_BL`` (bool, True where there is a token).
    """

    tensors: Mapping[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Words:
        return Words({name: change(tensor) for name, tensor in self.tensors.items()})

    def repeat(self, times: int) -> Words:
        """All rows, ``times`` times one after the other."""
        return self._each(lambda t: t.repeat(times, *[1] * (t.ndim - 1)))

    def take(self, index_N: torch.Tensor) -> Words:
        """The rows with these numbers."""
        return self._each(lambda t: t[index_N.to(t.device)])

    def where(self, mask_B: torch.Tensor, other: Words) -> Words:
        """``other``'s rows where ``mask_B`` (bool) is False."""

        def choose(name: str, own: torch.Tensor) -> torch.Tensor:
            mask = mask_B.to(own.device).reshape(-1, *[1] * (own.ndim - 1))
            return torch.where(mask, own, other[name])

        return Words({name: choose(name, tensor) for name, tensor in self.tensors.items()})

    def to(self, device: str | None = None, dtype: torch.dtype | None = None) -> Words:
        """On a device; in ``dtype`` what is a floating number, so that masks and ids stay what they
        are."""
        return self._each(
            lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None)
        )

    @staticmethod
    def cat(parts: Sequence[Words]) -> Words:
        """The rows of all parts, which have the same names."""
        names = parts[0].tensors
        return Words({name: torch.cat([part[name] for part in parts]) for name in names})

    @property
    def summary_BD(self) -> torch.Tensor:
        """One vector a row, for a value network: the mean embedding of the tokens that count.

        Raises UserError for a family whose words have no ``embeds_BLD``.
        """
        if "embeds_BLD" not in self.tensors:
            raise UserError(
                "algorithm.value_lr must be 0 for a policy whose words have no embeds_BLD, got"
                f" words {', '.join(self.tensors)}"
            )
        embeds_BLD = self["embeds_BLD"]
        mask_BL = self.tensors.get("mask_BL")
        if mask_BL is None:
            return embeds_BLD.mean(1)
        weight_BL1 = mask_BL.to(embeds_BLD.dtype)[:, :, None]
        return (embeds_BLD * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1.0)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The words of B captions, and the two that stand in for a caption."""

    caption: Words
    empty: Words
    """The empty caption's: what caption dropout puts in its place."""
    against: Words | None = None
    """What classifier-free guidance goes away from; None is the empty caption."""
    detach_uncond: bool = False
    """Whether a guided look stops gradients at what guidance goes away from."""

    def _each(self, change: Callable[[Words], Words]) -> Condition:
        return replace(
            self,
            caption=change(self.caption),
            empty=change(self.empty),
            against=None if self.against is None else change(self.against),
        )

    def rows(self, repeat: int) -> Condition:
        """The condition of a batch in which every sample appears ``repeat`` times in a row of
        blocks."""
        return self._each(lambda words: words.repeat(repeat))

    def take(self, index_N: torch.Tensor) -> Condition:
        """The condition of the rows with these numbers."""
        return self._each(lambda words: words.take(index_N))

    def dropped(self, empty_B: torch.Tensor) -> Condition:
        """The condition with the empty caption where ``empty_B`` (bool) says so: caption
        dropout."""
        return replace(self, caption=self.empty.where(empty_B, self.caption))

    def to(self, device: str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """``Words.to`` of each."""
        return self._each(lambda words: words.to(device, dtype))

    def both(self) -> Words:
        """(2B rows) what guidance goes away from, then the captions: a guided pass."""
        return Words.cat([self.empty if self.against is None else self.against, self.caption])
