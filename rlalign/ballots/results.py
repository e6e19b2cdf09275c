"""What the votes of a campaign say, as one record: people, agreement, strengths, pace.

Gold pairs and repeats measure people and count for nothing else; the votes of people who are left
out, by hand or by a rule, are counted in nothing but their own line.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from rlalign.ballots import schema
from rlalign.ballots.agreement import USUAL_ALPHA, agreement, alpha, count_values
from rlalign.ballots.quality import Quality, Rules, Share, fault, measure
from rlalign.ballots.records import Stock, Vote
from rlalign.ballots.store import Store
from rlalign.ballots.strengths import Strengths, fit_strengths, votes_needed, win_matrix

OUTCOMES = ("left", "right", "tie")
_MOST_PAIRS = 20
"""Pairs with most disagreement that are listed."""


@dataclass(frozen=True, kw_only=True)
class Person:
    """One person's line."""

    quality: Quality
    name: str
    status: str
    fault: str
    """Why a rule leaves them out; empty where none does."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One policy's line in the ranking."""

    policy: str
    strength: float
    """Log-odds against the anchor, whose own is 0."""
    low: float
    high: float
    wins: float
    """Against all others, ties as a half."""
    votes: int
    win_rate: float
    """Against the anchor as fitted, sides balanced and ties as a half."""
    more_votes: int | None
    """About how many more between it and the anchor tell that rate from one half (95 %, power
    80 %); None for the anchor and where the rate is one half."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Policies by Bradley-Terry; each list is in the order of ``standings``."""

    anchor: str
    standings: tuple[Standing, ...]
    wins: tuple[tuple[float, ...], ...]
    """Of the row over the column."""
    left: float
    """Log-odds that a picture gains by being on the left."""
    left_low: float
    left_high: float


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of it; ``to_json`` gives plain values."""

    campaign: str
    cursor: int
    """The log's row up to which votes are counted."""
    rules: Rules
    choices: Mapping[str, int]
    """Votes by choice, of people who count."""
    by_rule: Mapping[str, int]
    """Votes on pairs to learn from, by the rule that chose the pair; skips left out."""
    stock: Stock
    people: Sequence[Person]
    gold: Share
    repeats: Share
    left: Share
    alpha: float
    usual_alpha: tuple[float, float] = USUAL_ALPHA
    agreement: float
    agreement_interval: tuple[float, float]
    shared: int
    """Sets of pictures on which several people voted."""
    disagreement: Sequence[Mapping[str, Any]]
    """The pairs on which people differ most: caption, uids, votes for each uid and for none."""
    per_hour: Sequence[tuple[float, int]]
    """(start of an hour, votes) of the hours with votes."""
    ranking: Ranking | None = field(default=None)
    """None where fewer than two policies met."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, with each share's value and interval written out."""
        return _plain(self)


def collect_results(
    store: Store, campaign: str, now: float, rules: Rules | None = None, anchor: str = ""
) -> Results:
    """The results as of now. ``anchor`` names the policy of strength 0: the one with most votes
    where it is empty or unknown."""
    # who counts
    rules = rules or Rules()
    cursor = store.cursor()
    every = list(store.votes(campaign, upto=cursor))
    people = _people(store, every, rules)
    out = {one.quality.annotator for one in people if one.fault or one.status != "active"}
    votes = [vote for vote in every if vote.ballot.annotator not in out]
    asked = [v for v in votes if v.ballot.item.kind in ("live", "shared")]

    # what they say
    counting = [one.quality for one in people if one.quality.annotator not in out]
    units = _units(asked)
    counts_UV = count_values({unit: [best for _, best in said] for unit, said in units.items()})
    share, interval = agreement(counts_UV)
    hours = Counter(math.floor(vote.at / 3600) * 3600.0 for vote in votes)
    return Results(
        campaign=campaign,
        cursor=cursor,
        rules=rules,
        choices=dict(Counter(vote.answer.choice for vote in votes)),
        by_rule=dict(Counter(_rule_of(v) for v in asked if v.answer.choice != "skip")),
        stock=store.stock(campaign, now),
        people=people,
        gold=_sum([one.gold for one in counting]),
        repeats=_sum([one.repeats for one in counting]),
        left=_sum([one.left for one in counting]),
        alpha=alpha(counts_UV),
        agreement=share,
        agreement_interval=interval,
        shared=int((counts_UV.sum(axis=1) > 1).sum()),
        disagreement=_disagreement(units),
        per_hour=sorted(hours.items()),
        ranking=rank_policies(asked, _policies(store), anchor),
    )


def _people(store: Store, votes: Sequence[Vote], rules: Rules) -> list[Person]:
    known = {one.id: one for one in store.annotators()}
    return [
        Person(
            quality=one,
            name=known[one.annotator].name,
            status=known[one.annotator].status,
            fault=fault(one, rules),
        )
        for one in measure(votes)
    ]


def _rule_of(vote: Vote) -> str:
    """The rule that chose a vote's pair: among those that waited, or among a caption's pictures."""
    ballot = vote.ballot
    return ballot.item.rule if ballot.rule == "random" else ballot.rule


def _sum(shares: Sequence[Share]) -> Share:
    return Share(count=sum(s.count for s in shares), of=sum(s.of for s in shares))


# --- agreement -----------------------------------------------------------------------------------

_Unit = tuple[str, tuple[str, ...]]


def _units(votes: Sequence[Vote]) -> dict[_Unit, list[tuple[str, int]]]:
    """(caption, uids) -> (person, index of the best uid) of those who voted; -1 for none.

    Uids are sorted: they are hashes, so an index says nothing by itself, and both are as frequent.
    """
    found: dict[_Unit, list[tuple[str, int]]] = defaultdict(list)
    for vote in votes:
        if vote.answer.choice != "skip":
            uids = tuple(sorted(vote.ballot.item.uids))
            best = uids.index(vote.best) if vote.best else -1
            found[vote.ballot.item.caption, uids].append((vote.ballot.annotator, best))
    return found


def _disagreement(units: Mapping[_Unit, list[tuple[str, int]]]) -> list[dict[str, Any]]:
    """The sets of pictures on which the fewest pairs of people agree, those of many votes first."""
    found = []
    for (caption, uids), said in units.items():
        counts = Counter(best for _, best in said)
        count = len(said)
        if count < 2 or len(counts) < 2:
            continue
        same = sum(n * (n - 1) for n in counts.values()) / (count * (count - 1))
        line = {
            "caption": caption,
            "uids": uids,
            "votes": [counts[i] for i in range(len(uids))],
            "none": counts[-1],
        }
        found.append((same, -count, uids, line))
    return [line for _, _, _, line in sorted(found, key=lambda one: one[:3])[:_MOST_PAIRS]]


# --- the ranking ---------------------------------------------------------------------------------


def _policies(store: Store) -> dict[str, str]:
    """uid -> policy, of the pictures that say theirs."""
    table = schema.picture
    with store.reading() as connection:
        rows = connection.execute(
            sa.select(table.c.uid, table.c.policy).where(table.c.policy != "")
        )
        return {row.uid: row.policy for row in rows}


def count_meetings(
    votes: Sequence[Vote], policies: Mapping[str, str]
) -> tuple[list[str], np.ndarray]:
    """(policies, (A, N, N, 3) counts for ``fit_strengths``) of the pairs of two policies; the
    policy with most votes comes first."""
    met: list[tuple[str, str, str, int]] = []
    often = Counter[str]()
    for vote in votes:
        for left, right, outcome in vote.pairs:
            names = (policies.get(left, ""), policies.get(right, ""))
            if all(names) and names[0] != names[1]:
                met.append((vote.ballot.annotator, *names, OUTCOMES.index(outcome)))
                often.update(names)
    names = sorted(often, key=lambda name: (-often[name], name))
    people = sorted({person for person, _, _, _ in met})
    counts = np.zeros((len(people), len(names), len(names), len(OUTCOMES)))
    for person, left, right, outcome in met:
        counts[people.index(person), names.index(left), names.index(right), outcome] += 1
    return names, counts


def rank_policies(
    votes: Sequence[Vote], policies: Mapping[str, str], anchor: str = ""
) -> Ranking | None:
    """The ranking of the policies that met; None where no two did."""
    names, counts = count_meetings(votes, policies)
    if len(names) < 2:
        return None
    base = names.index(anchor) if anchor in names else 0
    fitted = fit_strengths(counts, anchor=base)
    wins_NN = win_matrix(counts)
    order = sorted(range(len(names)), key=lambda i: (-fitted.strength[i], names[i]))
    left_low, left_high = fitted.left_interval()
    return Ranking(
        anchor=names[base],
        standings=tuple(_standing(names, fitted, wins_NN, i, base) for i in order),
        wins=tuple(tuple(float(wins_NN[i, j]) for j in order) for i in order),
        left=float(fitted.left),
        left_low=float(left_low),
        left_high=float(left_high),
    )


def _standing(
    names: Sequence[str], fitted: Strengths, wins_NN: np.ndarray, index: int, base: int
) -> Standing:
    low_N, high_N = fitted.interval()
    rate = _win_rate(fitted, index)
    more = None
    if index != base and round(rate, 6) != 0.5:
        # votes that hang together by person are worth fewer
        needed = votes_needed(rate) * max(float(fitted.widening[index]), 1.0)
        have = wins_NN[index, base] + wins_NN[base, index]
        more = max(math.ceil(needed - have), 0)
    return Standing(
        policy=names[index],
        strength=float(fitted.strength[index]),
        low=float(low_N[index]),
        high=float(high_N[index]),
        wins=float(wins_NN[index].sum()),
        votes=int(wins_NN[index].sum() + wins_NN[:, index].sum()),
        win_rate=rate,
        more_votes=more,
    )


def _win_rate(fitted: Strengths, index: int) -> float:
    """Of a policy against the anchor, as often on the left as on the right, ties as a half."""
    rates = []
    for side in (float(fitted.left), -float(fitted.left)):
        lean = float(fitted.strength[index]) + side
        won = 1 / (1 + math.exp(float(fitted.threshold) - lean))
        lost = 1 / (1 + math.exp(float(fitted.threshold) + lean))
        rates.append(0.5 * (1 + won - lost))
    return sum(rates) / 2


def _plain(value: Any) -> Any:
    if isinstance(value, Share):
        return {**asdict(value), "value": value.value, "interval": value.interval}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
