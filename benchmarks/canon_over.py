"""The lecture's central figure for docs/canon.md: held-out score against the reward gained, with samples; numbers as text."""

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

LAST = 3
"""Evaluations at the end of a DPOK run whose mean counts as where it ended."""

Track = list[tuple[int, float, float]]
"""Per evaluation: round, kB saved a picture, held-out score."""


def section(ddpo: Sequence[Path], dpok: Sequence[Path], images: Path) -> str:
    """The numbers as text, one pair of run folders a seed; the two pictures go into ``images``."""
    pairs = [(track(a), track(b)) for a, b in zip(ddpo, dpok, strict=True)]
    figure(pairs, images / "canon-over-optimisation.png")
    head = "| seed | DPOK ends at, kB saved | held-out score left | DDPO when it had saved as much | ratio |"
    rows, ends = [head, "|---|---|---|---|---|"], []
    for seed, (free, held) in enumerate(pairs):
        gain, kept = (statistics.mean(one[i] for one in held[-LAST:]) for i in (1, 2))
        alone = at_gain(free, gain)
        most = max(t[1] for t in free)
        less = f" (at {most:.3f}, its most)" if most < gain else ""
        ends.append((gain, kept, alone))
        rows.append(f"| {seed} | {gain:.3f} | {kept:.3f} | {alone:.3f}{less} | {kept / alone:.1f} |")
    gain, kept, alone = (statistics.mean(column) for column in zip(*ends, strict=True))
    rows.append(f"| mean | {gain:.3f} | {kept:.3f} | {alone:.3f} | {kept / alone:.1f} |")
    shown = [nearest(pairs[0][0], ends[0][0]), pairs[0][1][-1]]
    sheets = [ddpo[0] / "samples" / "round-00000.png"]
    sheets += [f[0] / "samples" / f"round-{one[0]:05d}.png" for f, one in zip((ddpo, dpok), shown, strict=True)]
    stacked(sheets, images / "canon-samples.png")
    finals = ", ".join(f"{free[0][2]:.3f} to {free[-1][2]:.3f} ({free[-1][1]:+.3f} kB)" for free, _ in pairs)
    return (
        f"DDPO alone: in {pairs[0][0][-1][0]} rounds the held-out score falls from {finals}, by seed.\n\n"
        + "\n".join(rows)
        + f"\n\nThe pictures, of seed 0, show the same prompts and noise: before, DDPO after {shown[0][0]} rounds "
        f"({shown[0][1]:+.3f} kB), DPOK after {shown[1][0]} rounds ({shown[1][1]:+.3f} kB)."
    )


def track(folder: Path) -> Track:
    """A run's evaluations."""
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    first = lines[0]["reward/jpeg/mean"]
    return [(e["round"], e["reward/jpeg/mean"] - first, e["held_out/shapes/mean"]) for e in lines]


def figure(pairs: Sequence[tuple[Track, Track]], path: Path) -> None:
    """Every seed's two tracks; a ring where DPOK ended."""
    drawn, panel = plt.subplots(figsize=(6.4, 4.2))
    for seed, (free, held) in enumerate(pairs):
        for one, colour, name in ((free, "C3", "DDPO"), (held, "C0", "DPOK")):
            x, y = [t[1] for t in one], [t[2] for t in one]
            label = f"{name}, {len(pairs)} seeds" if seed == 0 else None
            panel.plot(x, y, "o-", color=colour, ms=2.5, lw=1.3, alpha=0.85, label=label)
        gain, kept = (statistics.mean(one[i] for one in held[-LAST:]) for i in (1, 2))
        rest = {"mfc": "none", "mec": "black", "ms": 11, "mew": 1.4, "ls": "none"}
        panel.plot([gain], [kept], "o", label="DPOK's end" if seed == 0 else None, **rest)
    panel.set_xlabel("reward gained: kB saved per picture")
    panel.set_ylabel("held-out shapes score")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    drawn.tight_layout()
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def at_gain(one: Track, gain: float) -> float:
    """The held-out score where a track first passes a gain, between its evaluations."""
    for (_, x0, y0), (_, x1, y1) in itertools.pairwise(one):
        if x0 <= gain <= x1:
            return y0 + (y1 - y0) * (gain - x0) / (x1 - x0)
    return one[-1][2]


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
