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
from canon_over import Frontier, section

GAIN = 0.20
"""The gain in the verifier's score whose cost in reward queries is compared."""


PAIRS, OVER = "## From pairs alone", "## Over-optimisation, and the KL against it"
"""Headings of the parts that are written by themselves."""
TEMPLATE = Path(__file__).with_name("canon_page.md")


def write_page(docs: Path, results: Sequence[dict[str, Any]], rounds: int) -> None:
    """The page's first part: the table, the picture, what a gain costs."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in results:
        groups.setdefault(one["contestant"].name, []).append(one)
    curves(groups, docs / "images" / "canon.png")
    parts = {"TABLE": table(groups), "COST": cost_to_reach(groups), "ROUNDS": str(rounds)}
    parts["SEEDS"] = str(max(len(g) for g in groups.values()))
    put(docs / "canon.md", "# ", parts)


def write_offline(docs: Path, folders: Sequence[Path]) -> None:
    """Diffusion-DPO from a set of pairs."""
    rows = [
        "| seed | verifier before | after | won against the base | fitted reward gain |",
        "|---|---|---|---|---|",
    ]
    for seed, folder in enumerate(folders):
        final = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        base, aligned = final["base"], final["aligned"]
        rows.append(
            f"| {seed} | {shapes_of(base):.3f} | {shapes_of(aligned):.3f} |"
            f" {final['win_rate']['shapes']:.1%} | {fitted_of(aligned) - fitted_of(base):+.2f} |"
        )
    put(docs / "canon.md", PAIRS, {"OFFLINE": "\n".join(rows)})


def write_over_optimisation(
    docs: Path, ddpo: Sequence[Path], dpok: Sequence[Path], frontier: Frontier
) -> None:
    """The page's last part."""
    put(docs / "canon.md", OVER, {"OVER": section(ddpo, dpok, frontier, docs / "images")})


def put(page: Path, heading: str, values: dict[str, str]) -> None:
    """Writes one part of the page from the template's; the other parts stay as they are."""
    new, old = (parted(path.read_text(encoding="utf-8")) for path in (TEMPLATE, page))
    for key, value in values.items():
        new[heading] = new[heading].replace("{{" + key + "}}", value)
    page.write_text(
        "".join({**new, **old, heading: new[heading]}[name] for name in new), encoding="utf-8"
    )


def parted(text: str) -> dict[str, str]:
    """Heading -> text from there on, for the parts that are written by themselves."""
    bounds = (
        [(0, "# ")] + [(text.index(h), h) for h in (PAIRS, OVER) if h in text] + [(len(text), "")]
    )
    return {name: text[start:end] for (start, name), (end, _) in itertools.pairwise(bounds)}


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean and half the range, as text."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):{sign}.{digits}f} ± {half:.{digits}f}"


def shapes_of(evaluation: dict[str, Any]) -> float:
    """The verifier's mean, trained on or held out."""
    return next(
        evaluation[f"{kind}/shapes/mean"]
        for kind in ("reward", "held_out")
        if f"{kind}/shapes/mean" in evaluation
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
        kl = [
            r["final"]["kl/per_step_gaussian"] * elements * k
            for r, k in zip(runs, steps, strict=True)
        ]
        stochastic = runs[0]["final"]["plan"]["eta"] > 0
        one = runs[0]
        rows.append(
            f"| {one['contestant'].title} | {model} | {statistics.mean(map(shapes_of, base)):.3f} |"
            f" {statistics.mean(map(shapes_of, after)):.3f} | {spread(gain, sign='+')} |"
            f" {spread(fitted, 2, '+')} | {spread([a['diversity/pixel_rms'] for a in after])} |"
            f" {spread(kl, 1) if stochastic else 'no density'} | {one['reward_queries']:,} |"
            f" {one['sampling_calls']:,} + {one['update_calls']:,.0f} |"
            f" {statistics.mean(r['seconds'] / r['final']['round'] for r in runs):.1f} |"
        )
    return head + "\n".join(rows)


def cost_to_reach(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Reward queries until the held-out prompts' score has risen by GAIN, per seed."""
    lines = [f"| algorithm | reward queries to gain {GAIN:.2f}, per seed |", "|---|---|"]
    for runs in groups.values():
        reached = []
        for run in runs:
            start = shapes_of(run["evaluations"][0])
            rounds = next(
                (e["round"] for e in run["evaluations"] if shapes_of(e) - start >= GAIN), None
            )
            reached.append(f"{rounds * run['queries_per_round']:,}" if rounds else "not reached")
        name = runs[0]["contestant"]
        lines.append(
            f"| {name.title}{' (flow)' if 'flow' in name.name else ''} | {', '.join(reached)} |"
        )
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
            columns = list(
                zip(*([shapes_of(e) for e in r["evaluations"]] for r in runs), strict=False)
            )
            style = {"color": f"C{number}", "lw": 1.8}
            panel.plot(
                x, [statistics.mean(c) for c in columns], label=runs[0]["contestant"].title, **style
            )
            panel.fill_between(
                x,
                [min(c) for c in columns],
                [max(c) for c in columns],
                color=f"C{number}",
                alpha=0.12,
                lw=0,
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
