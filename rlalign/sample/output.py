"""What a sampling leaves: pictures, scores, cost, and a page that shows them side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlalign.checkpoint import disk_errors, write_text
from rlalign.pictures import Cell, write_grid
from rlalign.report import curves
from rlalign.report.gallery import picture_uri
from rlalign.report.numbers import number, signed
from rlalign.sample.outcome import Outcome
from rlalign.sample.settings import Sample

TEMPLATE = Path(__file__).parent.parent / "assets" / "sample.html.j2"


def prepare(sample: Sample, folder: Path) -> None:
    """Makes the folder and writes the settings, before any work."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_dump(json.loads(sample.model_dump_json()), sort_keys=False, allow_unicode=True)
        write_text(folder / "config.yaml", settings)


def write_outputs(sample: Sample, folder: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """pictures/, samples.png, sample.json, report.html; returns what sample.json holds."""
    result = describe(sample, outcomes)
    prompts = sample.unit.prompts
    with disk_errors(folder):
        write_pictures(folder / "pictures", outcomes[0].media_BFCHW)
        for outcome in outcomes:
            name = "samples" if outcome is outcomes[0] else f"samples-{_slug(outcome.title)}"
            title = f"{outcome.title}: {outcome.sampler.name}"
            write_grid(
                folder / f"{name}.png", outcome.media_BFCHW[:, 0], prompts, outcome.scores.total_B.tolist(), title=title
            )
        write_text(folder / "sample.json", json.dumps(result, indent=2) + "\n")
        write_text(folder / "report.html", page(sample, outcomes, result))
    return result


def describe(sample: Sample, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every method's means, cost and settings, and every picture's scores. A missing score is null."""
    plain = next((o for o in outcomes if o.sampler.name == "plain"), None)
    methods = [
        {
            "title": o.title,
            "sampler": json.loads(o.sampler.model_dump_json()),
            **o.summary(sample, plain),
            "cost": vars(o.cost),
            "series": {name: list(values) for name, values in o.found.series.items()},
            "lineages": _lineages(o),
            "log_evidence": o.found.log_evidence_B.tolist() if o.found.log_evidence_B is not None else None,
        }
        for o in outcomes
    ]
    pictures = [
        {"prompt": prompt, **{o.title: _picture_scores(o, i) for o in outcomes}}
        for i, prompt in enumerate(sample.unit.prompts)
    ]
    return {
        "name": sample.name,
        "model": sample.model.title,
        "plan": sample.plan.model_dump(),
        "methods": methods,
        "pictures": pictures,
    }


def _picture_scores(outcome: Outcome, i: int) -> dict[str, float | None]:
    raw = {title: _known(value_B[i]) for title, value_B in outcome.scores.raw.items()}
    return {"total": _known(outcome.scores.total_B[i]), **raw}


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _lineages(outcome: Outcome) -> float | None:
    """Mean over pictures of how many first particles the last ones descend from."""
    roots_BN = outcome.found.roots_BN
    return float(np.mean([len(set(row.tolist())) for row in roots_BN])) if roots_BN is not None else None


def _slug(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def write_pictures(folder: Path, media_BFCHW: np.ndarray) -> None:
    """One PNG a picture (a video's first frame), numbered from 0."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for i, pixels_CHW in enumerate(media_BFCHW[:, 0]):
        Image.fromarray(pixels_CHW.transpose(1, 2, 0)).save(folder / f"{i:05d}.png")


def write_so_far(sample: Sample, folder: Path, media: Sequence[tuple[str, np.ndarray]]) -> str:
    """Grids of what there is after a failure; returns where they are, in words."""
    if not media:
        return "nothing was drawn yet"
    with disk_errors(folder):
        names = []
        for title, media_BFCHW in media:
            names.append(f"{_slug(title)}.png")
            write_grid(
                folder / names[-1],
                media_BFCHW[:, 0],
                sample.unit.prompts,
                [float("nan")] * len(media_BFCHW),
                title=title,
            )
    return f"the pictures so far are in {folder} ({', '.join(names)})"


def page(sample: Sample, outcomes: Sequence[Outcome], result: dict[str, Any]) -> str:
    """The report as one self-contained page."""
    from jinja2 import Environment, StrictUndefined

    shown = min(sample.pictures, 24)
    rows = [{"prompt": sample.unit.prompts[i], "cells": [_cell(o, i) for o in outcomes]} for i in range(shown)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, signed=signed)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    keys = [k for k in result["methods"][0] if k.endswith("/mean") or k.startswith("diversity")]
    if len(sample.rewards) == 1 and sample.rewards[0].weight == 1.0:
        keys.remove("reward/total/mean")  # of a single reward the total says nothing new
    return template.render(
        result=result,
        keys=keys,
        rows=rows,
        charts=_charts(outcomes),
        shown=shown,
        settings=(sample.model_dump_json(indent=2)),
    )


def _cell(outcome: Outcome, i: int) -> dict[str, Any]:
    from PIL import Image

    picture = Image.fromarray(outcome.media_BFCHW[i, 0].transpose(1, 2, 0))
    uri = picture_uri(Cell(picture=picture, caption="", score=None))
    return {"uri": uri, "score": _known(outcome.scores.total_B[i]), "title": outcome.title}


def _charts(outcomes: Sequence[Outcome]) -> list[curves.Chart]:
    """What the method saw on its way."""
    charts = []
    along = "update" if hasattr(outcomes[0].sampler, "updates") else "step"
    for name, values in outcomes[0].found.series.items():
        if values:
            line = curves.Series(label=name, x=list(range(1, len(values) + 1)), y=list(values))
            charts.append(curves.line_chart(name.capitalize(), "Mean over pictures.", [line], along=along))
    return charts
