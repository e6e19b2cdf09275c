"""What algorithms share that prefer one sample of a prompt to another."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from rlalign.algorithms.base import Algorithm, Given, check_company
from rlalign.core.copies import Copy, Every


class PairwiseAlgorithm(Algorithm):
    """Base of an algorithm of pairs, whose reference may follow the policy."""

    refresh_every: int = Field(
        default=0,
        ge=0,
        description="rounds after which the reference becomes the current policy; 0 never",
    )

    def check(self, given: Given) -> None:
        super().check(given)
        check_company(self.name, given, within="unit")

    @property
    def copies(self) -> Mapping[str, Copy]:
        return {"reference": Every(self.refresh_every)} if self.refresh_every else {}
