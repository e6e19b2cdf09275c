"""The numbers of /results, ready to be shown: ``rlalign.ballots.results`` as text and lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

NOTHING = "–"
MAX_HOURS = 48
"""Hours of the chart, the last ones."""
BAR_WIDTH = 220


def lay_out(
    found: Mapping[str, Any], words: Mapping[str, str], key_of: Callable[[str], str]
) -> dict[str, Any]:
    """What the template fills in. ``found`` are the plain values of ``Results.to_json``; ``key_of``
    gives the key under which the administrator may ask for a picture."""
    return {
        "cards": _cards(found, words),
        "people": [_person(line, words) for line in found["people"]],
        "rules": [
            {"rule": rule, "votes": f"{votes:,}"}
            for rule, votes in sorted(found["by_rule"].items(), key=lambda one: -one[1])
        ],
        "ranking": _ranking(found["ranking"]),
        "hours": _hours(found["per_hour"]),
        "disagreement": [_dispute(line, key_of) for line in found["disagreement"]],
    }


def _dispute(line: Mapping[str, Any], key_of: Callable[[str], str]) -> dict[str, Any]:
    """Pictures on which people disagree, with the votes for each."""
    pictures = [
        {"key": key_of(uid), "votes": votes}
        for uid, votes in zip(line["uids"], line["votes"], strict=True)
    ]
    return {"caption": line["caption"], "pictures": pictures, "none": line["none"]}


def _cards(found: Mapping[str, Any], words: Mapping[str, str]) -> list[dict[str, str]]:
    """The line of the most important numbers: value, name, and what goes with it."""
    skips = found["choices"].get("skip", 0)
    votes = sum(found["choices"].values()) - skips
    out = sum(1 for line in found["people"] if _is_out(line))
    hours = [count for _, count in found["per_hour"]]
    usual = found["usual_alpha"]
    return [
        _card(words, "votes", f"{votes:,}", words["results_skips"].format(count=skips)),
        _card(words, "people", str(len(found["people"]) - out), _left_out(words, out)),
        _card(words, "pace", f"{sum(hours) / len(hours):.0f}" if hours else NOTHING),
        _card(words, "gold", percent(found["gold"]), interval(found["gold"])),
        _card(words, "repeats", percent(found["repeats"]), interval(found["repeats"])),
        _card(words, "left", percent(found["left"]), interval(found["left"])),
        _card(
            words,
            "agreement",
            share(found["agreement"]),
            between(found["agreement_interval"], share),
        ),
        _card(
            words,
            "alpha",
            decimal(found["alpha"]),
            words["results_usual"].format(low=f"{usual[0]:g}", high=f"{usual[1]:g}"),
        ),
    ]


def _card(words: Mapping[str, str], name: str, value: str, note: str = "") -> dict[str, str]:
    return {"name": words[f"results_{name}"], "value": value, "note": note}


def _left_out(words: Mapping[str, str], count: int) -> str:
    return words["results_left_out"].format(count=count)


def _is_out(line: Mapping[str, Any]) -> bool:
    return bool(line["fault"]) or line["status"] != "active"


def _person(line: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, str]:
    quality = line["quality"]
    state = line["fault"] or ("" if line["status"] == "active" else line["status"])
    return {
        "name": line["name"] or quality["annotator"][:8],
        "votes": f"{quality['votes']:,}",
        "skips": str(quality["skips"]),
        "gold": of(quality["gold"]),
        "repeats": of(quality["repeats"]),
        "left": percent(quality["left"]),
        "ties": percent(quality["ties"]),
        "seconds": f"{quality['median_ms'] / 1000:.1f}" if quality["votes"] else NOTHING,
        "state": state or words["results_counts"],
        "out": "bad" if _is_out(line) else "",
    }


def _ranking(ranking: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The table of policies, with places on one scale for their intervals."""
    if ranking is None:
        return None
    lines = ranking["standings"]
    low = min(0.0, *(line["low"] for line in lines))
    high = max(0.0, *(line["high"] for line in lines))
    scale = BAR_WIDTH / max(high - low, 1e-9)

    def at(value: float) -> float:
        return round((value - low) * scale, 1)

    def laid_out(line: Mapping[str, Any], wins: Sequence[float]) -> dict[str, Any]:
        return {
            "policy": line["policy"],
            "strength": decimal(line["strength"]),
            "interval": between((line["low"], line["high"]), decimal),
            "from": at(line["low"]),
            "at": at(line["strength"]),
            "to": at(line["high"]),
            "rate": share(line["win_rate"]),
            "votes": f"{line['votes']:,}",
            "more": NOTHING if line["more_votes"] is None else f"{line['more_votes']:,}",
            "wins": list(map(_count, wins)),
        }

    return {
        "anchor": ranking["anchor"],
        "left": decimal(ranking["left"]),
        "left_interval": between((ranking["left_low"], ranking["left_high"]), decimal),
        "width": BAR_WIDTH,
        "zero": at(0.0),
        "names": [line["policy"] for line in lines],
        "lines": [laid_out(*one) for one in zip(lines, ranking["wins"], strict=True)],
    }


def _hours(per_hour: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Votes an hour: the hours with votes, their heights in percent of the highest."""
    last = [(start, int(count)) for start, count in per_hour][-MAX_HOURS:]
    most = max((count for _, count in last), default=0)
    return [
        {
            "hour": datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%d %H:00"),
            "votes": count,
            "height": round(100 * count / most, 1),
        }
        for start, count in last
    ]


# --- numbers as text ------------------------------------------------------------------------------


def _count(value: float) -> str:
    return f"{value:g}"


def decimal(value: float | None) -> str:
    """Two decimals with a sign that is a minus."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def share(value: float | None) -> str:
    """A share as whole percent."""
    return NOTHING if value is None or not math.isfinite(value) else f"{100 * value:.0f} %"


def percent(found: Mapping[str, Any]) -> str:
    """A ``Share`` as whole percent."""
    return share(found["value"])


def of(found: Mapping[str, Any]) -> str:
    """A ``Share`` as "7 of 8", without words."""
    return f"{found['count']} / {found['of']}" if found["of"] else NOTHING


def interval(found: Mapping[str, Any]) -> str:
    """The interval of a ``Share``, and of how many it is."""
    if not found["of"]:
        return ""
    return f"{between(found['interval'], share)} · {of(found)}"


def between(ends: Sequence[float | None], text: Callable[[float | None], str]) -> str:
    """An interval, "" where it has no ends."""
    low, high = (text(end) for end in ends)
    return "" if NOTHING in (low, high) else f"{low} … {high}"
