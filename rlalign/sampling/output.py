"""What a sampling leaves: pictures, scores, cost, and a page that shows them side by side."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlalign.core.clips import encode_clip
from rlalign.core.files import write_whole
from rlalign.core.pictures import remove_grid, write_grid
from rlalign.learning.checkpoint import disk_errors
from rlalign.learning.evaluate import said_of
from rlalign.report import curves
from rlalign.report.gallery import cells
from rlalign.report.pages import write_page
from rlalign.sampling.outcome import Outcome
from rlalign.sampling.settings import Sample

SO_FAR = tuple(
    f"so-far/{name}.png" for name in ("method", "plain", "best-of-n-same-cost", "so-far")
)
"""What a sampling that failed leaves: the next one replaces it."""


def prepare(sample: Sample, folder: Path) -> None:
    """Writes the settings, before any work."""
    with disk_errors(folder):
        settings = yaml.safe_dump(
            json.loads(sample.model_dump_json()), sort_keys=False, allow_unicode=True
        )
        write_whole(folder / "config.yaml", settings)


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
                folder / f"{name}.png",
                outcome.media_BFCHW,
                prompts,
                outcome.scores.total_B.tolist(),
                title=title,
            )
        write_whole(folder / "sample.json", json.dumps(result, indent=2) + "\n")
        write_report(folder / "report.html", sample, outcomes, result)
    return result


def describe(sample: Sample, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every method's means, cost and settings, and every picture's scores. A missing score is
    null."""
    plain = next((o for o in outcomes if o.sampler.name == "plain"), None)
    pictures = []
    for i, prompt in enumerate(sample.unit.prompts):
        scores = {o.title: _picture_scores(o, i) for o in outcomes}
        pictures.append({**said_of(prompt), **scores})
    return {
        "name": sample.name,
        "model": sample.model.title,
        "plan": sample.plan.model_dump(),
        "methods": [_describe_method(sample, outcome, plain) for outcome in outcomes],
        "pictures": pictures,
    }


def _describe_method(sample: Sample, outcome: Outcome, plain: Outcome | None) -> dict[str, Any]:
    found = outcome.found
    evidence_B = found.log_evidence_B
    return {
        "title": outcome.title,
        "sampler": json.loads(outcome.sampler.model_dump_json()),
        **outcome.summary(sample, plain),
        "cost": vars(outcome.cost),
        "series": {name: list(values) for name, values in found.series.items()},
        "lineages": _lineages(outcome),
        "log_evidence": evidence_B.tolist() if evidence_B is not None else None,
    }


def _picture_scores(outcome: Outcome, i: int) -> dict[str, float | None]:
    raw = {title: _known(value_B[i]) for title, value_B in outcome.scores.raw.items()}
    return {"total": _known(outcome.scores.total_B[i]), **raw}


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _lineages(outcome: Outcome) -> float | None:
    """Mean over pictures of how many first particles the last ones descend from."""
    roots_BN = outcome.found.roots_BN
    if roots_BN is None:
        return None
    return float(np.mean([len(set(row.tolist())) for row in roots_BN]))


def _slug(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def write_pictures(folder: Path, media_BFCHW: np.ndarray) -> None:
    """One PNG a picture, one lossless animated WebP a clip, numbered from 0."""
    folder.mkdir(exist_ok=True)
    for i, media_FCHW in enumerate(media_BFCHW):
        content, kind = encode_clip(media_FCHW)
        (folder / f"{i:05d}.{kind.removeprefix('image/')}").write_bytes(content)


def write_so_far(sample: Sample, folder: Path, media: Sequence[tuple[str, np.ndarray]]) -> str:
    """Grids of what there is after a failure; returns where they are, in words."""
    if not media:
        return "nothing was drawn yet"
    folder = folder / "so-far"
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        names = []
        for title, media_BFCHW in media:
            names.append(f"{_slug(title)}.png")
            write_grid(
                folder / names[-1],
                media_BFCHW,
                sample.unit.prompts,
                [float("nan")] * len(media_BFCHW),
                title=title,
            )
    return f"the pictures so far are in {folder} ({', '.join(names)})"


def remove_so_far(folder: Path) -> None:
    """Deletes what an earlier sampling left that failed."""
    for name in SO_FAR:
        remove_grid(folder / name)
    # it is not there, or holds something else
    with contextlib.suppress(OSError):
        (folder / "so-far").rmdir()


def write_report(
    path: Path, sample: Sample, outcomes: Sequence[Outcome], result: dict[str, Any]
) -> None:
    """Writes the report, one self-contained page."""
    shown = min(sample.pictures, 24)
    prompts = sample.unit.prompts[:shown]
    columns = [cells(o.media_BFCHW[:shown], prompts, o.scores.total_B[:shown]) for o in outcomes]
    keys = [k for k in result["methods"][0] if k.endswith("/mean") or k.startswith("diversity")]
    if len(sample.rewards) == 1 and sample.rewards[0].weight == 1.0:
        # of a single reward the total says nothing new
        keys.remove("reward/total/mean")
    write_page(
        path,
        "sample",
        result=result,
        keys=keys,
        rows=list(zip(*columns, strict=True)),
        charts=_charts(outcomes),
        shown=shown,
        plays=any(cell.is_clip for column in columns for cell in column),
        settings=sample.model_dump_json(indent=2),
    )


def _charts(outcomes: Sequence[Outcome]) -> list[curves.Chart]:
    """What the method saw on its way."""
    charts = []
    along = "update" if hasattr(outcomes[0].sampler, "updates") else "step"
    for name, values in outcomes[0].found.series.items():
        if values:
            line = curves.Series(label=name, x=range(1, len(values) + 1), y=values)
            title = name.capitalize()
            charts.append(curves.line_chart(title, "Mean over pictures.", [line], along=along))
    return charts
