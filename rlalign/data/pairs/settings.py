"""Where preference pairs come from, how they are dealt out, and what gives them by round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rlalign.core.locations import LocalPattern, PathToBeOrUrl
from rlalign.core.registry import Before
from rlalign.data.pairs.buckets import buckets_of
from rlalign.data.pairs.rows import Pair, Resize

Ties = Literal["drop", "half"]


class BallotSettings(BaseModel):
    """Which votes of people a run learns from, and how many it waits for."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    store: PathToBeOrUrl = Field(
        min_length=1,
        description="the store of rlalign vote: a SQLite file, or the URL of a PostgreSQL database",
    )
    campaign: str = Field(default="", description="whose votes; empty is the only one of the store")
    least: int = Field(default=1, ge=1, description="votes that the first round waits for")
    fresh: int = Field(
        default=0,
        ge=0,
        description="votes that a round waits for beyond those that the rounds before it have seen",
    )
    patience_seconds: float = Field(
        default=0.0,
        ge=0.0,
        description="how long a round waits before the run ends; 0 is for as long as it takes",
    )
    min_ms: int = Field(
        default=0, ge=0, description="votes that were decided in less milliseconds are left out"
    )
    min_gold: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="people who are right on a smaller share of the gold pairs are left out",
    )
    min_repeats: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="people who answer a smaller share of repeats alike are left out",
    )


def _ballots(value: Any) -> Any:
    return {"store": value} if isinstance(value, str) else value


_BALLOTS = BeforeValidator(_ballots, json_schema_input_type=BallotSettings | str | None)


class PreferenceSettings(BaseModel):
    """Where preference pairs come from, and how they are dealt out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    made_elsewhere: ClassVar[bool] = False
    """Whether neither a file nor a store needs to be named."""

    path: LocalPattern = Field(
        default="",
        description=(
            "Parquet in Pick-a-Pic v2's columns, or JSON that names pictures (HPD v2's train.json,"
            " or chosen and rejected): a file, a folder or a glob"
        ),
    )
    ballots: Annotated[BallotSettings | None, _BALLOTS, Before(None)] = Field(
        default=None,
        description=(
            "in place of path: the store of rlalign vote, or a mapping with more; a set that grows"
            " while people vote"
        ),
    )
    pairs_per_round: int = Field(
        default=64, ge=1, description="pairs of a round, or of one update of fit-reward"
    )
    pairs_per_pass: int = Field(
        default=16, ge=1, description="pairs that go through the network at once"
    )
    ties: Ties = Field(
        default="drop", description="a tie is dropped, or counts as half a win for both"
    )
    bad_share: float = Field(
        default=0.01, ge=0.0, le=1.0, description="largest share of bad rows before it is refused"
    )
    shuffle: int = Field(
        default=1024,
        ge=1,
        description="rows of a shuffle window; 1 keeps the order of the row groups",
    )
    size: int = Field(
        default=0,
        ge=0,
        description=(
            "side of the square that pictures are resized to, or of its area with buckets, in"
            " pixels; 0 as they are"
        ),
    )
    resize: Annotated[Resize, Before("squash")] = Field(
        default="squash",
        description=(
            "how: squash; crop the centre once the shorter side has that size, as published"
            " trainers do; or buckets: to the nearest shape of that area, SDXL's table at 1024"
        ),
    )
    reader: Literal["arrow", "ray"] = Field(
        default="arrow",
        description=(
            "arrow reads in the learner; ray streams through Ray Data, for sets of many files"
        ),
    )

    @model_validator(mode="after")
    def _fits_together(self) -> PreferenceSettings:
        if self.path and self.ballots is not None:
            raise ValueError(
                "path and ballots exclude each other: pairs come from files, or from people's"
                f" votes, got {self.path!r} and {self.ballots.store!r}"
            )
        if not (self.path or self.ballots is not None or self.made_elsewhere):
            raise ValueError("path is required, or ballots: where the pairs come from")
        if self.ballots is not None and self.reader == "ray":
            raise ValueError("reader must be arrow with ballots, got 'ray', which reads files")
        if self.pairs_per_pass > self.pairs_per_round:
            raise ValueError(
                f"pairs_per_pass must be <= pairs_per_round ({self.pairs_per_round}), got"
                f" {self.pairs_per_pass}"
            )
        if self.resize != "squash" and not self.size:
            what = "side of the square that is cut out"
            if self.resize == "buckets":
                what = "side of the square whose area the buckets have"
            raise ValueError(f"size must be > 0 with resize {self.resize}: the {what}, got 0")
        if self.resize == "buckets":
            buckets_of(self.size)
        return self

    @property
    def source(self) -> str:
        """Where the pairs come from, for people: without the password of a URL."""
        if self.ballots is None:
            return self.path
        return f"the votes in {self.ballots.store.rpartition('@')[2]}"


class Pairing(ABC):
    """Pairs of preferences by round, whoever reads them."""

    settings: PreferenceSettings
    seed: int
    grows: ClassVar[bool] = False
    """Whether there may be more pairs later, so that what a round has is decided when it begins."""

    @property
    def note(self) -> str:
        """Which rows of the set are left out, in a line; empty where none is."""
        return ""

    @abstractmethod
    def round(self, number: int) -> list[Pair]:
        """The pairs of round ``number`` >= 0."""

    def passes(self, number: int) -> Iterator[list[Pair]]:
        """The pairs of a round in slices of ``pairs_per_pass``. With buckets a slice is of one
        bucket, and the last one of each may be smaller: the pairs of a round do not change."""
        pairs = self.round(number)
        step = self.settings.pairs_per_pass
        groups = [pairs]
        if self.settings.resize == "buckets":
            by_shape: dict[tuple[int, ...], list[Pair]] = {}
            for pair in pairs:
                by_shape.setdefault(pair.media_0.shape, []).append(pair)
            groups = list(by_shape.values())
        for group in groups:
            for start in range(0, len(group), step):
                yield group[start : start + step]

    def measures(self, number: int) -> Mapping[str, float]:
        """What the metrics line says of the pairs of a round."""
        return {}
