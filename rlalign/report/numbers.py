"""The numbers of a report in words: headline, comparison, cost, and how a number is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlalign.learning.shares import reward_shares
from rlalign.report.files import RunFiles
from rlalign.report.rewards import total_role


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The first thing a reader sees."""

    what: str
    before: float | None = None
    after: float | None = None
    wins: float | None = None
    interval: tuple[float, float] | None = None
    """95 % interval of the gain, from the paired differences."""

    def sentence(self) -> str:
        """The whole of it in one line."""
        if self.before is None or self.after is None:
            return self.what
        text = (
            f"{self.what}: {number(self.before)} → {number(self.after)}"
            f" ({signed(self.after - self.before)})"
        )
        return text if self.wins is None else f"{text}; wins {100 * self.wins:.0f} % of pairs"


def headline(run: RunFiles) -> Headline:
    """From the paired comparison, else the evaluations so far, else the training rewards, else a
    plain statement."""
    title = main_title(run)
    key = f"reward/{title}/mean"
    named = f"{title} reward"
    # the first of these that the run has come to
    if run.final is not None:
        samples = run.final["samples"]
        return Headline(
            what=f"Mean {named} on {run.final['prompts']} held-out prompts",
            before=run.final["base"][key],
            after=run.final["aligned"][key],
            wins=run.final["win_rate"][title],
            interval=paired_interval([(s["base"][title], s["aligned"][title]) for s in samples]),
        )
    if len(run.evaluations) > 1:
        first = run.evaluations[0]
        last = run.evaluations[-1]
        return Headline(
            what=f"Mean {named} on held-out prompts until round {last['round']}",
            before=first[key],
            after=last[key],
        )
    if len(run.rounds) > 1:
        first = run.rounds[0]
        last = run.rounds[-1]
        return Headline(
            what=f"Mean {named} in training, round 1 to {run.done}",
            before=first[key],
            after=last[key],
        )
    return Headline(what="No two rounds to compare yet")


def main_title(run: RunFiles) -> str:
    """The only reward by its name where the total is nothing else; the total otherwise."""
    weights = [r.get("weight", 1.0) for r in run.config.get("rewards", [])]
    return run.trained[0] if len(run.trained) == 1 and weights == [1.0] else "total"


def paired_interval(
    pairs: Sequence[tuple[float | None, float | None]],
) -> tuple[float, float] | None:
    """95 % interval of the mean of after - before, normal approximation; None under eight known
    pairs."""
    gaps = [after - before for before, after in pairs if before is not None and after is not None]
    if len(gaps) < 8:
        return None
    mean = sum(gaps) / len(gaps)
    half = 1.96 * math.sqrt(sum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1) / len(gaps))
    return mean - half, mean + half


def comparison(run: RunFiles) -> list[dict[str, Any]]:
    """Rows of the table base against aligned; of the first and last evaluation where the run has
    not ended."""
    if run.final is None and len(run.evaluations) < 2:
        return []
    # the two ends of the comparison
    final = run.final or {
        "base": run.evaluations[0],
        "aligned": run.evaluations[-1],
        "win_rate": {},
    }
    # the rows: rewards that were followed, those that were measured, diversity
    weights = {
        r.get("label") or r["name"]: r.get("weight", 1.0) for r in run.config.get("rewards", [])
    }
    rows = []
    if main_title(run) == "total":
        rows = [("total reward", "reward/total/mean", "total", total_role(run.config))]
    rows += [
        (t, f"reward/{t}/mean", t, f"trained on, weight {weights.get(t, 1.0):g}")
        for t in run.trained
    ]
    rows += [(t, f"held_out/{t}/mean", t, "held out") for t in run.held_out]
    rows += group_rows(final["aligned"], str((run.config.get("evaluate") or {}).get("by") or ""))
    rows += [("diversity", "diversity/pixel_rms", "", "pixel distance of pairs, of 1")]
    return [
        {
            "name": name,
            "role": role,
            "base": final["base"].get(key),
            "aligned": final["aligned"].get(key),
            "gain": gap(final["base"].get(key), final["aligned"].get(key)),
            "wins": final["win_rate"].get(title),
        }
        for name, key, title, role in rows
    ]


def group_rows(summary: Mapping[str, Any], by: str) -> list[tuple[str, str, str, str]]:
    """(name, key, "", role) of each mean by ``by``, a field of the prompts' records."""
    rows = []
    for key in summary if by else ():
        _, title, name = [*key.split("/", 2), "", ""][:3]
        if name == f"mean_by_{by}":
            rows.append((title, key, "", f"mean over {by}"))
        elif name.startswith(f"{by}="):
            rows.append((title, key, "", f"{by} = {name.removeprefix(f'{by}=')}"))
    return rows


def gap(before: float | None, after: float | None) -> float | None:
    """after - before; None where either is missing."""
    return None if before is None or after is None else after - before


def cost(run: RunFiles) -> list[tuple[str, str]]:
    """(what, how much) of the whole run; evaluations count in the time only."""
    if not run.rounds:
        return []
    last = run.rounds[-1]
    # sums over the run
    learning = sum(r["seconds/round"] or 0.0 for r in run.rounds)
    looking = sum(e["seconds"] or 0.0 for e in run.evaluations)
    dropped = sum(r.get("samples_dropped", 0) for r in run.rounds)
    restarts = {role: last.get(f"restarts/{role}", 0) for role in ("rollout", "reward")}
    rows = [
        ("Rounds", f"{run.done:,}"),
        ("Samples", f"{last['samples']:,}" + (f" ({dropped:,} dropped)" if dropped else "")),
        ("Denoiser calls", f"{last['denoiser_calls']:,}"),
        ("Reward queries", f"{last['reward_queries']:,}"),
        ("Optimiser updates", f"{last['policy_version']:,}"),
        ("Time in rounds", clock(learning)),
        *_reward_times(run),
        ("Time in evaluations", clock(looking)),
        ("Samples per second", f"{last['samples'] / max(learning, 1e-9):.1f}"),
        (
            "Worker restarts",
            " + ".join(f"{n} {role}" for role, n in restarts.items() if n) or "none",
        ),
        ("Largest staleness", f"{max(r.get('staleness/max', 0) for r in run.rounds)} rounds"),
        *_node_hours(run),
    ]
    through = last.get("driver_bytes_per_sample")
    return rows + ([("Through the driver", f"{through:,.0f} bytes a sample")] if through else [])


def _node_hours(run: RunFiles) -> list[tuple[str, str]]:
    """What a cluster's nodes cost, without their price; none for runs in one process."""
    last = next((r for r in reversed(run.rounds) if "nodes/hours" in r), None)
    if last is None:
        return []
    hours = {name: last[f"nodes/{name}"] for name in ("hours", "cpu_hours", "gpu_hours")}
    said = "{hours:,.2f}, with {cpu_hours:,.2f} CPU hours and {gpu_hours:,.2f} GPU hours"
    drained = last["nodes/drained"]
    gone = [("Nodes taken away with notice", f"{drained:,.0f}")] if drained else []
    return [("Node hours", said.format(**hours)), *gone]


def _reward_times(run: RunFiles) -> list[tuple[str, str]]:
    """Which rewards the rounds waited for; none for runs that did not measure it."""
    said = [f"{title} {100 * share:.0f} %" for title, share in reward_shares(run.rounds).items()]
    return [("Waited for rewards", f"{', '.join(said)} of the time in rounds")] if said else []


def number(value: float | None) -> str:
    """Four digits or so: 0.614, 12.35, 1,234.5; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if 0 < size < 0.001:
        return f"{value:.1e}".replace("-", "−")
    return f"{value:,.{3 if size < 10 else 2 if size < 100 else 1}f}".replace("-", "−")


def signed(value: float | None) -> str:
    """A number with its sign."""
    text = number(value)
    return f"+{text}" if value is not None and value >= 0 else text


def hundredths(value: float | None) -> str:
    """A correlation: two digits after the point."""
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def clock(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"
