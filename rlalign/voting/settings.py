"""The settings of ``rlalign vote``: one YAML file, as a run file is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from rlalign.config import RuntimeSettings, load_mapping, parse, parse_plugins
from rlalign.core.locations import LocalPath, LocalPattern, NamesFile, PathToBeOrUrl
from rlalign.core.records import Plan
from rlalign.core.registry import UserError, build, plugin_field
from rlalign.data.prompts.base import Prompts
from rlalign.policies.base import PolicyRecipe
from rlalign.rewards.base import Reward, refuse_latents
from rlalign.web.token import is_loopback
from rlalign.web.vote.serving import PageSettings

Rule = Literal["random", "uncertain", "fisher", "gap"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _policy(place: str) -> BeforeValidator:
    def build_one(value: Any) -> Any:
        return value if isinstance(value, str) or value is None else build("policies", value, place)

    return BeforeValidator(build_one)


class SourceSettings(_Settings):
    """Where pictures come from: one of samples, pictures, policy and run."""

    samples: LocalPath = Field(
        default="", description="folder of a run or of rlalign sample: the pictures of its grids"
    )
    pictures: LocalPattern = Field(
        default="",
        description=(
            "Parquet with captions and pictures (labels are not read), or a folder of pictures with"
            " metadata.jsonl, a .txt beside each, or a folder for each caption"
        ),
    )
    policy: Annotated[
        str | SerializeAsAny[PolicyRecipe] | None,
        _policy("source.policy"),
        NamesFile(unless=r"\w+"),
    ] = Field(
        default=None, description="a policy's settings, or the path of a run or pipeline folder"
    )
    against: Annotated[
        str | SerializeAsAny[PolicyRecipe] | None,
        _policy("source.against"),
        NamesFile(unless=r"\w+"),
    ] = Field(
        default=None,
        description="mode ab: the other side, of the same kind (samples, pictures, or a policy)",
    )
    run: Annotated[str, NamesFile(may_come=True)] = Field(
        default="",
        description="folder of a run that learns from the votes: its newest checkpoint draws",
    )
    plan: Plan = Field(default=Plan(), description="how a policy draws")
    per_prompt: int = Field(
        default=2, ge=2, description="pictures of a caption at once, of which the rule picks"
    )
    rows: int = Field(default=16, ge=1, description="pictures in a piece of work")

    @model_validator(mode="after")
    def _is_one(self) -> SourceSettings:
        named = {
            "samples": self.samples,
            "pictures": self.pictures,
            "policy": self.policy,
            "run": self.run,
        }
        given = [name for name, value in named.items() if value]
        if len(given) != 1:
            raise ValueError(
                "one of samples, pictures, policy and run must say where pictures come from, got"
                f" {', '.join(given) or 'none'}"
            )
        return self

    @property
    def kind(self) -> Literal["samples", "pictures", "policy", "run"]:
        """Which of the four it is."""
        if self.samples:
            return "samples"
        if self.pictures:
            return "pictures"
        return "run" if self.run else "policy"


class Shares(_Settings):
    """Of all ballots, how many measure people; the rest is live."""

    gold: float = Field(
        default=0.05, ge=0, lt=1, description="a picture of the caption against one of another"
    )
    repeat: float = Field(
        default=0.05, ge=0, lt=1, description="a person's own pair again, sides swapped"
    )
    shared: float = Field(default=0.10, ge=0, le=1, description="pairs that several people get")
    random: float = Field(
        default=0.25, gt=0, le=1, description="of live pairs, those that no rule has chosen"
    )

    @model_validator(mode="after")
    def _leave_live_ones(self) -> Shares:
        if self.gold + self.repeat + self.shared >= 1:
            raise ValueError(
                "gold, repeat and shared must sum to less than 1, got"
                f" {self.gold + self.repeat + self.shared:g}"
            )
        return self


class Filter(_Settings):
    """A picture is shown to nobody whose score is below the threshold, or missing."""

    reward: SerializeAsAny[Annotated[Reward, plugin_field("rewards", "filter.reward")]]
    least: float = Field(description="smallest score of a picture that is shown")

    @model_validator(mode="after")
    def _sees_pictures(self) -> Filter:
        refuse_latents([self.reward], "reward", "a picture that people are shown has")
        return self


class Simulate(_Settings):
    """Simulated people: they know a hidden utility, and choose by it with noise."""

    votes: int = Field(ge=1, description="votes in all")
    people: int = Field(default=6, ge=1, description="who take turns")
    utility: tuple[
        SerializeAsAny[Annotated[Reward, plugin_field("rewards", "simulate.utility")]], ...
    ] = Field(min_length=1, description="the hidden utility: a weighted sum of rewards")
    temperature: float = Field(
        default=0.1,
        gt=0,
        description="a picture that is better by d is chosen with probability sigmoid(d / this)",
    )
    lapse: float = Field(
        default=0.03, ge=0, le=1, description="share of choices by a coin, whatever is shown"
    )
    left: float = Field(default=0.1, description="bias to the left, in log odds")

    @model_validator(mode="after")
    def _see_pictures(self) -> Simulate:
        refuse_latents(self.utility, "utility", "a picture that people are shown has")
        return self


class PageWords(_Settings):
    """What the page says and asks."""

    title: str = Field(default="", max_length=100, description="empty is the campaign's name")
    consent: str = Field(
        default="", description="text that a person agrees to before the first vote; empty is none"
    )
    reasons: tuple[str, ...] = Field(
        default=(),
        max_length=12,
        description="what a vote may give as its reasons, as [prompt, looks, shape, text, safety]",
    )
    points: bool = Field(default=False, description="people may point at places in the pictures")
    typing: bool = Field(default=False, description="mode chain: people may type a prompt")
    ties: bool = Field(default=True, description="people may say that both are as good")
    both_bad: bool = Field(default=True, description="people may say that both are bad")


class Vote(_Settings):
    """Everything that defines a campaign, and the page that serves it."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64, description="the campaign's name"
    )
    seed: int = Field(default=0, ge=0, description="decides prompts, noise and pairs")
    mode: Literal["pairs", "chain", "rank", "ab"] = Field(
        default="pairs",
        description=(
            "pairs; chain (the winner stays); rank (several pictures in order); ab (two policies,"
            " blind)"
        ),
    )
    pictures: int = Field(default=3, ge=3, le=6, description="mode rank: pictures of a ballot")
    store: PathToBeOrUrl = Field(
        default="", description="a file, or a PostgreSQL URL; empty is runs/votes/NAME.db"
    )
    source: SourceSettings
    prompts: SerializeAsAny[Annotated[Prompts, plugin_field("prompts")]] | None = Field(
        default=None, description="what a policy draws; files bring their own captions"
    )
    votes_per_item: int = Field(default=1, ge=1, description="votes wanted for a live pair")
    votes_per_shared: int = Field(default=3, ge=2, description="votes wanted for a shared one")
    votes_each: int = Field(default=0, ge=0, description="votes of a person; 0 has no end")
    votes_per_round: int = Field(
        default=0,
        ge=0,
        description="source.run: pairs for one round, then the page waits for the next; 0 never",
    )
    ahead: int = Field(default=16, ge=1, description="pairs that are kept ready")
    low: int = Field(default=8, ge=0, description="pairs below which more are made")
    shares: Shares = Shares()
    rule: Rule = Field(
        default="random",
        description="which pair next: random, or uncertain, fisher or gap by a fitted reward",
    )
    reward: LocalPath = Field(
        default="",
        description="folder of fit-reward, for a rule; empty is the shipped one for 32x32 shapes",
    )
    filter: Filter | None = Field(default=None, description="before a picture is shown")
    export: str = Field(
        default="", description="Parquet that the votes are written to when the command ends"
    )
    simulate: Simulate | None = Field(default=None, description="simulated people vote as well")
    page: PageWords = PageWords()
    server: PageSettings = PageSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Vote:
        source = self.source
        if source.kind == "policy" and self.prompts is None:
            raise UserError("prompts is required with source.policy: what the policy draws")
        if (self.mode == "ab") != (source.against is not None):
            raise UserError(
                "mode ab and source.against go together: two sides are compared, got mode"
                f" {self.mode} and against {source.against!r}"
            )
        if source.against is not None and source.kind == "run":
            raise UserError("source.against must be left out with source.run, which has one side")
        if self.votes_per_round and source.kind != "run":
            raise UserError(
                f"votes_per_round is about source.run, got {self.votes_per_round} without one"
            )
        if self.page.typing and (self.mode != "chain" or source.kind in ("samples", "pictures")):
            raise UserError(
                "page.typing is for mode chain with a policy that draws what people type, got mode"
                f" {self.mode} and source.{source.kind}"
            )
        if self.low > self.ahead:
            raise UserError(f"low must be <= ahead ({self.ahead}), got {self.low}")
        return self

    @property
    def per_item(self) -> int:
        """Pictures of an item."""
        return self.pictures if self.mode == "rank" else 2

    @property
    def per_caption(self) -> int:
        """Pictures of a caption that are made at once."""
        return max(self.source.per_prompt, self.per_item)

    @property
    def place(self) -> str:
        """The store's path or URL."""
        return self.store or str(Path("runs") / "votes" / f"{self.name}.db")

    @property
    def shown_place(self) -> str:
        """The store for people: without the password of a URL."""
        return self.place.rpartition("@")[2]


def load_vote(path: Path | str, overrides: Sequence[str] = ()) -> Vote:
    """The Vote of a YAML file with overrides applied."""
    return parse_vote(load_mapping(path, overrides))


def parse_vote(data: Mapping[str, Any]) -> Vote:
    """The Vote of a mapping; errors say where in the file they are.

    On a loopback address the page asks for no token, unless it is told to.
    """
    server = data.get("server") or {}
    if isinstance(server, Mapping) and "with_token" not in server:
        host = server.get("host", PageSettings.model_fields["host"].default)
        data = {**data, "server": {**server, "with_token": not is_loopback(str(host))}}
    return parse(Vote, parse_plugins(data, {"prompts": "prompts"}, ()))
