"""The table of a run's rewards in training: how far apart their scores are, and whether they pull
together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlalign.report.files import RunFiles

_ROUNDS = 5
"""The last rounds, of which the table has the mean."""


@dataclass(frozen=True, kw_only=True)
class RewardRow:
    """One reward, or the total of several."""

    title: str
    role: str
    before: float | None
    """Mean over the first round's samples."""
    after: float | None
    """The same over the last rounds'."""
    spread: float | None
    flat: float | None
    """Share of prompts whose samples all have the same score."""
    correlations: list[float | None]
    """With each reward of the table, itself left out (None)."""
    below: str
    """Samples of the last rounds below ``at_least``, of how many."""


@dataclass(frozen=True, kw_only=True)
class RewardTable:
    """Rows, and the titles of the columns of correlations: none of a single reward."""

    rounds: int
    titles: list[str]
    rows: list[RewardRow]
    has_constraints: bool


def reward_table(run: RunFiles) -> RewardTable | None:
    """From the metrics lines; None where no round is done, or none was scored."""
    trained = [t for t in run.trained if run.rounds and f"reward/{t}/std" in run.rounds[-1]]
    if not trained:
        return None
    last = run.rounds[-_ROUNDS:]
    settings = {r.get("label") or r["name"]: r for r in run.config.get("rewards", [])}
    several = len(trained) > 1
    rows = []
    for title in trained:
        said = settings.get(title, {})
        role = f"weight {said.get('weight', 1.0):g}"
        rows.append(_row(run, title, role, trained if several else [], said.get("at_least")))
    if several:
        rows.append(_row(run, "total", total_role(run.config), []))
    return RewardTable(
        rounds=len(last),
        titles=trained if several else [],
        rows=rows,
        has_constraints=any(row.below for row in rows),
    )


_TOTALS = {
    "sum": "sum of weight × reward",
    "normalised": "sum of weight × reward, to look at: each reward is learned by itself",
    "product": "product of rewards, each to the power of its weight",
}
"""How rewards are combined -> what their total is."""


def total_role(config: Mapping[str, Any]) -> str:
    """What the total of a run's rewards is, in words."""
    return _TOTALS[config.get("combine", "sum")]


def _row(
    run: RunFiles, title: str, role: str, others: Sequence[str], limit: float | None = None
) -> RewardRow:
    last = run.rounds[-_ROUNDS:]
    below = ""
    if limit is not None:
        broken = sum(line.get(f"constraint/{title}/below") or 0 for line in last)
        made = _samples_of(run)
        below = f"{broken:,} of {made:,} below {limit:g}".replace("-", "−")
    return RewardRow(
        title=title,
        role=role,
        before=run.rounds[0].get(f"reward/{title}/mean"),
        after=_mean(last, f"reward/{title}/mean"),
        spread=_mean(last, f"reward/{title}/std"),
        flat=_mean(last, f"reward/{title}/flat_groups"),
        correlations=[_correlation(last, title, other) for other in others],
        below=below,
    )


def _samples_of(run: RunFiles) -> int:
    """Samples of the last rounds."""
    last = run.rounds[-_ROUNDS:]
    earlier = run.rounds[-_ROUNDS - 1]["samples"] if len(run.rounds) > _ROUNDS else 0
    return last[-1]["samples"] - earlier


def _correlation(lines: Sequence[Mapping[str, Any]], one: str, other: str) -> float | None:
    """A line has it under the reward that comes first."""
    found = _mean(lines, f"reward/{one}/correlation/{other}")
    return _mean(lines, f"reward/{other}/correlation/{one}") if found is None else found


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = [line[key] for line in lines if line.get(key) is not None]
    return sum(known) / len(known) if known else None
