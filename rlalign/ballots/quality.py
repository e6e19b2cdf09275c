"""How carefully each person votes, and rules that leave people out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rlalign.ballots.agreement import share_interval
from rlalign.ballots.records import Vote


@dataclass(frozen=True, kw_only=True)
class Share:
    """So many of so many, with Wilson's 95 % interval."""

    count: int
    of: int

    @property
    def value(self) -> float | None:
        return self.count / self.of if self.of else None

    @property
    def interval(self) -> tuple[float, float]:
        return share_interval(self.count, self.of)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One person's votes."""

    annotator: str
    votes: int
    """Without skips."""
    skips: int
    gold: Share
    """Gold pairs answered as expected; a tie is not."""
    repeats: Share
    """Repeats answered as the first time, by picture."""
    left: Share
    """Left among the votes for one of two sides, gold aside."""
    ties: Share
    """Ties and two bad ones among the votes on pairs."""
    median_ms: float
    """Time to decide."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Whom to leave out: who is surely below a limit, with enough votes to say so."""

    min_gold: float = 0.0
    """Share of gold pairs; 0 asks for none."""
    min_repeats: float = 0.0
    """Share of repeats answered alike."""
    min_ms: float = 0.0
    """Median time to decide."""
    max_side: float = 1.0
    """Share of one side, left or right."""
    least: int = 5
    """Gold pairs, repeats or votes that a person must have before a rule applies."""


def measure(votes: Iterable[Vote]) -> list[Quality]:
    """The quality of everybody who voted, the most votes first."""
    every = list(votes)
    by_ballot = {vote.ballot.id: vote for vote in every}
    by_person: dict[str, list[Vote]] = defaultdict(list)
    for vote in every:
        by_person[vote.ballot.annotator].append(vote)
    found = [_quality(person, theirs, by_ballot) for person, theirs in by_person.items()]
    return sorted(found, key=lambda one: (-one.votes, one.annotator))


def _quality(person: str, votes: Sequence[Vote], by_ballot: Mapping[str, Vote]) -> Quality:
    said = [vote for vote in votes if vote.answer.choice != "skip"]
    gold = [vote for vote in said if vote.ballot.item.kind == "gold"]
    pairs = [vote for vote in said if len(vote.ballot.shown) == 2]
    sides = [v for v in pairs if v.answer.choice in ("left", "right") and v not in gold]

    # a repeat counts where the first answer still stands
    repeats = [
        (vote, by_ballot[vote.ballot.item.of_ballot])
        for vote in said
        if vote.ballot.item.of_ballot in by_ballot
    ]
    repeats = [(again, first) for again, first in repeats if first.answer.choice != "skip"]
    alike = sum(_as_sets(again) == _as_sets(first) for again, first in repeats)
    tied = sum(vote.answer.choice in ("tie", "both_bad") for vote in pairs)
    return Quality(
        annotator=person,
        votes=len(said),
        skips=len(votes) - len(said),
        gold=Share(count=sum(v.best == v.ballot.item.truth for v in gold), of=len(gold)),
        repeats=Share(count=alike, of=len(repeats)),
        left=Share(count=sum(v.answer.choice == "left" for v in sides), of=len(sides)),
        ties=Share(count=tied, of=len(pairs)),
        median_ms=median(vote.answer.decide_ms for vote in said) if said else 0.0,
    )


def _as_sets(vote: Vote) -> list[frozenset[str]]:
    """The groups without an order within them: a tie is the same from either side."""
    return [frozenset(group) for group in vote.groups]


def fault(quality: Quality, rules: Rules) -> str:
    """Why the rules leave a person out, in words; empty where they do not."""
    gold = quality.gold.value
    if gold is not None and quality.gold.of >= rules.least and gold < rules.min_gold:
        return f"{quality.gold.count} of {quality.gold.of} gold pairs, {rules.min_gold:.0%} asked"
    alike = quality.repeats.value
    if alike is not None and quality.repeats.of >= rules.least and alike < rules.min_repeats:
        of = quality.repeats
        return f"{of.count} of {of.of} repeats alike, {rules.min_repeats:.0%} asked"
    if quality.votes >= rules.least and quality.median_ms < rules.min_ms:
        return f"median of {quality.median_ms:.0f} ms, {rules.min_ms:.0f} asked"
    left = quality.left.value
    if left is not None and quality.left.of >= rules.least:
        side = max(left, 1 - left)
        if side > rules.max_side:
            return f"{side:.0%} on one side, {rules.max_side:.0%} allowed"
    return ""


def left_out(votes: Iterable[Vote], rules: Rules) -> dict[str, str]:
    """Person -> why, for those whom the rules leave out."""
    faults = {one.annotator: fault(one, rules) for one in measure(votes)}
    return {person: why for person, why in faults.items() if why}
