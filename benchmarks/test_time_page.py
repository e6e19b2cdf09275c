"""Writes what benchmarks/test_time.py found: docs/test-time-results.md and
docs/images/test-time.png."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Result = dict[str, Any]
TITLES = {
    "tiny": "The embedded UNet",
    "tiny_flow": "The embedded flow model",
    "aligned": "The UNet after DDPO (`configs/quickstart.yaml`), with a method on top",
}


def write_page(docs: Path, results: Sequence[Result], pictures: int, seeds: int) -> None:
    """The tables, one a model, and the picture."""
    lines = [
        "# Test-time methods, measured",
        "",
        *textwrap.wrap(
            f"`python benchmarks/test_time.py {pictures} {seeds}` writes this page: {pictures}"
            f" held-out captions, the same noise for every method, {seeds} seeds (± is half their"
            " range), 10 steps, float32 on one CPU core. A budget is denoiser calls a picture; a"
            " gradient back through one counts as two more. Black-box methods follow the `shapes`"
            " verifier and never see the fitted reward; those with a gradient (marked *) follow the"
            " fitted Bradley-Terry reward and never see the verifier. The flow model is told no"
            " rows of zeros in T5's place (`t5_tokens: 0`), a fifth of the time of its default.",
            100,
            break_on_hyphens=False,
        ),
        "",
    ]
    for model, title in TITLES.items():
        own = [r for r in results if r["model"] == model]
        if own:
            lines += [f"## {title}", "", *_table(own), ""]
    lines += ["![Verifier's score against denoiser calls](images/test-time.png)", ""]
    (docs / "test-time-results.md").write_text("\n".join(lines), encoding="utf-8")
    _picture(docs / "images" / "test-time.png", results)


def _table(results: Sequence[Result]) -> list[str]:
    budgets = sorted({r["budget"] for r in results if r["budget"]})
    heads = [f"shapes at {b}" for b in budgets] + [f"fitted at {b}" for b in budgets]
    last = budgets[-1]
    lines = [
        "| method | "
        + " | ".join(heads)
        + f" | diversity at {last} | reward queries at {last} | seconds at {last} |",
        "|---|" + "---|" * (len(heads) + 3),
    ]
    for method in dict.fromkeys(r["method"] for r in results):
        own = [r for r in results if r["method"] == method]
        star = "*" if own[0]["gradient"] else ""
        fixed = own[0]["budget"] == 0
        cells = []
        for key, digits in (("shapes", 3), ("fitted", 2)):
            for budget in budgets:
                at = [r[key] for r in own if fixed or r["budget"] == budget]
                cells.append(
                    _spread(at, digits) if at and (not fixed or budget == budgets[0]) else ""
                )
        end = [r for r in own if fixed or r["budget"] == last]
        for key, digits in (("diversity", 3), ("reward_queries", 0), ("seconds", 2)):
            cells.append(f"{np.mean([r[key] for r in end]):.{digits}f}" if end else "–")
        lines.append(f"| {method}{star} | " + " | ".join(cells) + " |")
    return lines


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.ptp(values) / 2:.{digits}f}"


def _picture(path: Path, results: Sequence[Result]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    models = [m for m in TITLES if any(r["model"] == m for r in results)]
    figure, axes = plt.subplots(
        1, len(models), figsize=(5.2 * len(models), 4.2), sharey=True, squeeze=False
    )
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    methods = list(dict.fromkeys(r["method"] for r in results if r["budget"]))
    for column, model in zip(axes[0], models, strict=True):
        for number, method in enumerate(methods):
            own = [r for r in results if r["model"] == model and r["method"] == method]
            budgets = sorted({r["budget"] for r in own})
            means = [np.mean([r["shapes"] for r in own if r["budget"] == b]) for b in budgets]
            style = "--" if own and own[0]["gradient"] else "-"
            if own:
                column.plot(
                    budgets,
                    means,
                    style,
                    marker="o",
                    markersize=4,
                    color=colours[number % 20],
                    label=method,
                )
        plain = [r["shapes"] for r in results if r["model"] == model and r["method"] == "plain"]
        column.axhline(float(np.mean(plain)), color="0.6", linewidth=1.0)
        column.text(42, float(np.mean(plain)) + 0.005, "plain", color="0.4", fontsize=8)
        column.set_title(
            {"tiny": "UNet", "tiny_flow": "flow model", "aligned": "UNet after DDPO"}[model],
            fontsize=11,
        )
        column.set_xscale("log", base=2)
        column.set_xticks([40, 80, 160], ["40", "80", "160"])
        column.set_xlabel("denoiser calls a picture")
        column.grid(alpha=0.25)
    axes[0][0].set_ylabel("shapes verifier, held-out captions")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
