"""The lecture's central figure for docs/canon.md: held-out score against the reward gained, with
samples; numbers as text."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

GAINS = (0.10, 0.15, 0.20, 0.25)
"""kB saved a picture, at which the algorithms are compared."""

Track = list[tuple[int, float, float]]
"""Per evaluation: round, kB saved a picture, held-out score."""
Frontier = Sequence[tuple[float, float]]
"""(kB saved, held-out score) of the base model's own samples under exponential weights."""


def section(ddpo: Sequence[Path], dpok: Sequence[Path], frontier: Frontier, images: Path) -> str:
    """The numbers as text, one pair of run folders a seed; the two pictures go into ``images``."""
    pairs = [(track(a), track(b)) for a, b in zip(ddpo, dpok, strict=True)]
    figure(pairs, frontier, images / "canon-over-optimisation.png")
    last = GAINS[-1]
    shown = [nearest(pairs[0][0], last), nearest(pairs[0][1], last)]
    sheets = [ddpo[0] / "samples" / "round-00000.png"]
    sheets += [
        f[0] / "samples" / f"round-{one[0]:05d}.png"
        for f, one in zip((ddpo, dpok), shown, strict=True)
    ]
    stacked(sheets, images / "canon-samples.png")
    finals = ", ".join(
        f"{free[0][2]:.3f} to {free[-1][2]:.3f} ({free[-1][1]:+.3f} kB)" for free, _ in pairs
    )
    a, b = (f"after {r} rounds ({x:+.3f} kB, score {y:.3f})" for r, x, y in shown)
    return (
        f"DDPO alone: in {pairs[0][0][-1][0]} rounds the held-out score falls from {finals}, by"
        f" seed.\n\n{table(pairs, frontier)}\n\nThe pictures, of seed 0, show the same prompts and"
        f" noise: before; DDPO {a}; DPOK {b}."
    )


def table(pairs: Sequence[tuple[Track, Track]], frontier: Frontier) -> str:
    """Held-out score kept at each gain: every seed's, and the means with their ratio."""
    rows = [
        (
            "| kB saved | DDPO, by seed | DPOK, by seed | ratio, by seed | ratio of the means |"
            " base model's samples, tilted |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for gain in GAINS:
        free, held = ([best_at(pair[i], gain) for pair in pairs] for i in (0, 1))
        ratios = ", ".join(f"{b / a:.1f}" for a, b in zip(free, held, strict=True))
        tilted = along(frontier, gain)
        rows.append(
            f"| {gain:.2f} | {', '.join(f'{y:.3f}' for y in free)} |"
            f" {', '.join(f'{y:.3f}' for y in held)} | {ratios} |"
            f" {statistics.mean(held) / statistics.mean(free):.1f} |"
            f" {'' if tilted is None else f'{tilted:.3f}'} |"
        )
    return "\n".join(rows)


def track(folder: Path) -> Track:
    """A run's evaluations."""
    lines = [
        json.loads(line)
        for line in (folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    first = lines[0]["reward/jpeg/mean"]
    return [(e["round"], e["reward/jpeg/mean"] - first, e["held_out/shapes/mean"]) for e in lines]


def best_at(one: Track, gain: float) -> float:
    """The highest held-out score that a run had with at least this gain, between evaluations by
    straight lines.

    Where a run never gained so much, the score at its most, which is more than it would have kept.
    """
    found = [y for _, x, y in one if x >= gain]
    for (_, x0, y0), (_, x1, y1) in itertools.pairwise(one):
        if (x0 - gain) * (x1 - gain) < 0:
            found.append(y0 + (y1 - y0) * (gain - x0) / (x1 - x0))
    return max(found, default=max(one, key=lambda t: t[1])[2])


def along(frontier: Frontier, gain: float) -> float | None:
    """The frontier's score at a gain; None beyond its end."""
    for (x0, y0), (x1, y1) in itertools.pairwise(frontier):
        if x0 <= gain <= x1:
            return y0 + (y1 - y0) * (gain - x0) / (x1 - x0)
    return None


def figure(pairs: Sequence[tuple[Track, Track]], frontier: Frontier, path: Path) -> None:
    """Every seed's two tracks, and the frontier."""
    drawn, panel = plt.subplots(figsize=(6.4, 4.2))
    for seed, (free, held) in enumerate(pairs):
        for one, colour, name in ((free, "C3", "DDPO"), (held, "C0", "DPOK")):
            label = f"{name}, {len(pairs)} seeds" if seed == 0 else None
            x, y = [t[1] for t in one], [t[2] for t in one]
            panel.plot(x, y, "o-", color=colour, ms=2.5, lw=1.3, alpha=0.85, label=label)
    panel.plot(*zip(*frontier, strict=True), "k--", lw=1.2, label="base model's samples, tilted")
    panel.set_xlabel("reward gained: kB saved per picture")
    panel.set_ylabel("held-out shapes score")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    drawn.tight_layout()
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def nearest(one: Track, gain: float) -> tuple[int, float, float]:
    """The evaluation whose gain is nearest."""
    return min(one, key=lambda t: abs(t[1] - gain))


def stacked(sheets: Sequence[Path], path: Path) -> None:
    """The first row of each grid, below one another."""
    rows = []
    for sheet in sheets:
        with Image.open(sheet) as opened:
            picture = opened.convert("RGB")
        rows.append(picture.crop((0, 0, picture.width, picture.height // 2)))
    whole = Image.new("RGB", (rows[0].width, sum(r.height for r in rows)), (250, 250, 248))
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    whole.save(path, optimize=True)
