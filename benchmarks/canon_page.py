"""docs/canon.md and its pictures, from the runs of benchmarks/canon.py."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

GAINS, SHOWN_GAIN = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35), 0.27
"""kB saved a picture at which over-optimisation is compared, and at which pictures are shown."""

GAIN = 0.20
"""The gain in the verifier's score whose cost in reward queries is compared."""


def write_page(docs: Path, results: Sequence[dict[str, Any]], over: Sequence[Path], rounds: int) -> None:
    """The page with its table and pictures."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in results:
        groups.setdefault(one["contestant"].name, []).append(one)
    images = docs / "images"
    curves(groups, images / "canon.png")
    text = Path(__file__).with_name("canon_page.md").read_text()
    parts = {"TABLE": table(groups), "COST": cost_to_reach(groups), "ROUNDS": str(rounds)}
    parts["OVER"] = "It has not been run beside the table above."
    parts["SEEDS"] = str(max(len(g) for g in groups.values()))
    if all((folder / "evaluation.json").is_file() for folder in over) and over:
        parts["OVER"] = over_optimisation(over, images)
    for key, value in parts.items():
        text = text.replace("{{" + key + "}}", value)
    (docs / "canon.md").write_text(text)
    print(text)


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean and half the range, as text."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):{sign}.{digits}f} ± {half:.{digits}f}"


def shapes_of(evaluation: dict[str, Any]) -> float:
    """The verifier's mean, trained on or held out."""
    return next(
        evaluation[f"{kind}/shapes/mean"] for kind in ("reward", "held_out") if f"{kind}/shapes/mean" in evaluation
    )


def fitted_of(evaluation: dict[str, Any]) -> float:
    """The fitted reward's mean, trained on or held out."""
    keys = ("held_out/fitted/mean", "reward/fitted/mean")
    return next((evaluation[k] for k in keys if k in evaluation), float("nan"))


def table(groups: dict[str, list[dict[str, Any]]]) -> str:
    """One row per contestant."""
    head = (
        "| algorithm | model | shapes before | after | gain | fitted reward gain | diversity | "
        "KL to base, nats | reward queries | denoiser calls: sampling + training | "
        "s / round |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for runs in groups.values():
        base, after = [r["final"]["base"] for r in runs], [r["final"]["aligned"] for r in runs]
        model = "flow" if "flow" in runs[0]["contestant"].name else "UNet"
        gain = [shapes_of(a) - shapes_of(b) for a, b in zip(after, base, strict=True)]
        fitted = [fitted_of(a) - fitted_of(b) for a, b in zip(after, base, strict=True)]
        elements = 4 * 16 * 16
        steps = [r["final"]["plan"]["steps"] for r in runs]
        kl = [r["final"]["kl/per_step_gaussian"] * elements * k for r, k in zip(runs, steps, strict=True)]
        stochastic = runs[0]["final"]["plan"]["eta"] > 0
        one = runs[0]
        rows.append(
            f"| {one['contestant'].title} | {model} | {statistics.mean(map(shapes_of, base)):.3f} | "
            f"{statistics.mean(map(shapes_of, after)):.3f} | {spread(gain, sign='+')} | {spread(fitted, 2, '+')} | "
            f"{spread([a['diversity/pixel_rms'] for a in after])} | {spread(kl, 1) if stochastic else 'no density'} | "
            f"{one['reward_queries']:,} | {one['sampling_calls']:,} + {one['update_calls']:,.0f} | "
            f"{statistics.mean(r['seconds'] / r['final']['round'] for r in runs):.1f} |"
        )
    return head + "\n".join(rows)


def cost_to_reach(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Reward queries until the held-out prompts' score has risen by GAIN, per seed."""
    lines = [f"| algorithm | reward queries to gain {GAIN:.2f}, per seed |", "|---|---|"]
    for runs in groups.values():
        reached = []
        for run in runs:
            start = shapes_of(run["evaluations"][0])
            rounds = next((e["round"] for e in run["evaluations"] if shapes_of(e) - start >= GAIN), None)
            reached.append(f"{rounds * run['queries_per_round']:,}" if rounds else "not reached")
        name = runs[0]["contestant"]
        lines.append(f"| {name.title}{' (flow)' if 'flow' in name.name else ''} | {', '.join(reached)} |")
    return "\n".join(lines)


def curves(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Score on held-out prompts against reward queries: mean of the seeds, and their range."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for panel, flow, name in (
        (panels[0], False, "UNet, epsilon prediction"),
        (panels[1], True, "transformer, rectified flow"),
    ):
        for number, runs in enumerate(g for n, g in groups.items() if ("flow" in n) == flow):
            rounds = [e["round"] for e in runs[0]["evaluations"]]
            x = [r * runs[0]["queries_per_round"] for r in rounds]
            columns = list(zip(*([shapes_of(e) for e in r["evaluations"]] for r in runs), strict=False))
            style = {"color": f"C{number}", "lw": 1.8}
            panel.plot(x, [statistics.mean(c) for c in columns], label=runs[0]["contestant"].title, **style)
            panel.fill_between(
                x, [min(c) for c in columns], [max(c) for c in columns], color=f"C{number}", alpha=0.12, lw=0
            )
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("reward queries")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("shapes score, 64 held-out prompts")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def over_optimisation(folders: Sequence[Path], images: Path) -> str:
    """The lecture's central figure: held-out score against the reward gained, with samples at equal gain; its numbers as text."""
    tracks = {}
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
        first = lines[0]["reward/jpeg/mean"]
        tracks[folder.name] = [(e["round"], e["reward/jpeg/mean"] - first, e["held_out/shapes/mean"]) for e in lines]
    (_, ddpo), (_, dpok) = tracks.items()
    gain = SHOWN_GAIN
    chosen = [min(track, key=lambda t: abs(t[1] - gain)) for track in (ddpo, dpok)]
    figure, panel = plt.subplots(figsize=(5.6, 3.8))
    for (name, track), colour in zip(tracks.items(), ("C3", "C0"), strict=True):
        panel.plot(
            [t[1] for t in track],
            [t[2] for t in track],
            "o-",
            color=colour,
            ms=3.5,
            label=name.split("_")[1].split("-")[0].upper(),
        )
    panel.axvline(gain, color="0.7", lw=1, ls="--")
    panel.set_xlabel("reward gained: kB saved per picture")
    panel.set_ylabel("held-out shapes score")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(images / "canon-over-optimisation.png", dpi=130)
    plt.close(figure)
    sheets = [folders[0] / "samples" / "round-00000.png"]
    sheets += [folder / "samples" / f"round-{one[0]:05d}.png" for folder, one in zip(folders, chosen, strict=True)]
    stacked(sheets, images / "canon-samples.png")
    rows = ["| kB gained | DDPO: held-out score left | DPOK: left | ratio |", "|---|---|---|---|"]
    for level in GAINS:
        without, with_kl = at_gain(ddpo, level), at_gain(dpok, level)
        rows.append(f"| {level:.2f} | {without:.3f} | {with_kl:.3f} | {with_kl / max(without, 1e-9):.2f} |")
    return (
        f"DDPO alone: {ddpo[-1][1]:+.3f} kB gained in {ddpo[-1][0]} rounds, and the held-out score falls from "
        f"{ddpo[0][2]:.3f} to {ddpo[-1][2]:.3f}. At equal gain, between evaluations:\n\n" + "\n".join(rows) + "\n\n"
        f"The pictures show the same prompts and noise: before, DDPO after {chosen[0][0]} rounds ({chosen[0][1]:+.3f} kB), "
        f"DPOK after {chosen[1][0]} rounds ({chosen[1][1]:+.3f} kB)."
    )


def at_gain(track: Sequence[tuple[int, float, float]], gain: float) -> float:
    """The held-out score where the track first passes a gain, between its evaluations."""
    for (_, x0, y0), (_, x1, y1) in itertools.pairwise(track):
        if x0 <= gain <= x1:
            return y0 + (y1 - y0) * (gain - x0) / (x1 - x0)
    return track[-1][2]


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


__all__ = ["write_page"]
