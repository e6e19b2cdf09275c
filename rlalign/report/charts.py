"""Which curves a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from rlalign.report.curves import Chart, Number, Series, line_chart, smooth, stacked_bars
from rlalign.report.files import Record, RunFiles
from rlalign.report.numbers import main_title

PHASES = {"rollout": 1, "reward": 2, "update": 3, "sync": 4}
"""Phase of a round -> its colour."""


def charts(run: RunFiles) -> list[Chart]:
    """Rewards first, then what the optimiser did, then where the time went."""
    return [*_rewards(run), *_optimiser(run), *_pictures(run), *_time(run)]


def _column(records: Sequence[Record], key: str) -> tuple[list[int], list[Number]]:
    """(rounds, values) of the records that have this key."""
    kept = [r for r in records if key in r]
    return [r["round"] for r in kept], [r[key] for r in kept]


def _rewards(run: RunFiles) -> list[Chart]:
    main = main_title(run)
    found = [_reward(run, main)]
    found += [_reward(run, title) for title in run.trained if title != main]
    for title in run.held_out:
        x, y = _column(run.evaluations, f"held_out/{title}/mean")
        line = Series(label="held-out reward", x=x, y=y, colour=2, look="points")
        note = "Measured on the evaluation's prompts, never trained on."
        found.append(line_chart(f"{title} (held out)", note, [line]))
    return [c for c in found if c is not None]


def _reward(run: RunFiles, title: str) -> Chart | None:
    """Training per round with a centred mean, and the evaluations."""
    key = f"reward/{title}/mean"
    x, y = _column(run.rounds, key)
    seen, measured = _column(run.evaluations, key)
    series = []
    window = 2 * (len(x) // 40) + 1
    if window > 1:
        series.append(Series(label="", x=x, y=y, look="faint"))
    if x:
        label = f"training prompts, mean of {window} rounds" if window > 1 else "training prompts"
        series.append(Series(label=label, x=x, y=smooth(y, window)))
    if seen:
        label = "held-out prompts, fixed noise"
        series.append(Series(label=label, x=seen, y=measured, colour=2, look="points"))
    heading = "Total reward" if title == "total" else f"{title} reward"
    note = "Mean of a round's samples, and of the evaluation's."
    return line_chart(heading, note, series) if series else None


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """A metric of the optimiser, and the setting that bounds it."""

    key: str
    title: str
    note: str
    limit: tuple[str, str] = ("", "")
    log: bool = False


_OPTIMISER = (
    _Curve(
        key="ratio/max_deviation",
        title="Ratio: largest |ratio − 1|",
        note="New over old density of a denoising step, before clipping. Log scale.",
        limit=("algorithm", "clip_range"),
        log=True,
    ),
    _Curve(
        key="ratio/clip_fraction",
        title="Clipped share",
        note="Share of samples and steps whose ratio met the clip range.",
    ),
    _Curve(
        key="preference/accuracy",
        title="Preferences agreed with",
        note="Share of pairs that the policy, against its reference, prefers as the labels do.",
    ),
    _Curve(
        key="entropy/per_step",
        title="Entropy of a step",
        note=(
            "Mean of −log p of the samples' steps, nats per latent element; where the plan sets the"
            " noise it stays."
        ),
    ),
    _Curve(
        key="grad_norm",
        title="Gradient norm",
        note="Before it is clipped.",
        limit=("learner", "max_grad_norm"),
    ),
)


def _optimiser(run: RunFiles) -> list[Chart]:
    keys = dict.fromkeys(chain.from_iterable(run.rounds))
    distances = [
        _Curve(key=k, title=f"KL: {k[3:].replace('_', ' ')}", note=_KL_NOTE)
        for k in keys
        if k.startswith("kl/")
    ]
    found = []
    for one in (*_OPTIMISER, *distances):
        x, y = _column(run.rounds, one.key)
        if not any(v is not None for v in y):
            continue
        series = [Series(label=one.key, x=x, y=y)]
        limit = run.config.get(one.limit[0], {}).get(one.limit[1])
        if limit:
            ends = [x[0], x[-1]]
            label = ".".join(one.limit)
            series.append(Series(label=label, x=ends, y=[limit] * 2, colour=0, look="limit"))
        found.append(line_chart(one.title, one.note, series, log=one.log))
    return found


_KL_NOTE = "Distance from the reference policy, in the unit that the algorithm names."


def _pictures(run: RunFiles) -> list[Chart]:
    x, y = _column(run.evaluations, "diversity/pixel_rms")
    note = (
        "Root mean square distance between the evaluation's pictures at 8 × 8 pixels; falls when"
        " they grow alike."
    )
    found = []
    if x:
        series = [Series(label="diversity", x=x, y=y, colour=2, look="points")]
        found.append(line_chart("Diversity", note, series))
    x, y = _column(run.evaluations, "kl/per_step_gaussian")
    if any(v for v in y):
        series = [Series(label="per step", x=x, y=y, colour=2, look="points")]
        note = (
            "Mean Gaussian KL of a step to the pretrained model, nats per latent element, on the"
            " policy's own trajectories."
        )
        found.append(line_chart("Distance from the base model", note, series))
    return found


def _time(run: RunFiles) -> list[Chart]:
    series = []
    for phase, colour in PHASES.items():
        x, y = _column(run.rounds, f"seconds/{phase}")
        if x:
            series.append(Series(label=phase, x=x, y=y, colour=colour))
    note = "Seconds of a round that the learner waited for, by what it waited for."
    return [stacked_bars("Time", note, series)] if series else []
