"""``rlalign sample``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from rlalign.cli import common
from rlalign.cli.common import ClusterAddress, Overrides, file_argument, folder_option


def sample(
    config: Annotated[Path, file_argument("A sample file.")],
    overrides: Overrides = None,
    local: Annotated[
        bool, typer.Option("--local", help="In this process, without Ray; the same pictures.")
    ] = False,
    address: ClusterAddress = None,
    out: Annotated[Path | None, folder_option("The folder; runs/NAME when left out.")] = None,
    mp4: Annotated[
        bool,
        typer.Option("--mp4", help="Clips as lossy MP4 too, to show; needs rlalign\\[video]."),
    ] = False,
) -> None:
    """Sample with a test-time method.

    Writes pictures, scores and cost, and a page that shows the method beside plain sampling and
    best-of-N at the same cost.
    """
    from rlalign.core.mp4 import write_mp4s
    from rlalign.learning.checkpoint import disk_errors
    from rlalign.learning.folders import holds_only, refuse_what_is_there
    from rlalign.sampling import SO_FAR, load_sample

    common.refuse_both_places(local, address)
    # what can be refused is refused before any work
    settings = load_sample(config, overrides or [])
    folder = out or Path("runs") / settings.name
    if not (folder.is_dir() and holds_only(folder, SO_FAR)):
        refuse_what_is_there(folder, "name another with --out DIR")
    settings.sampler.check(settings.unit)
    if mp4:
        _refuse_no_clips(settings)
    if local:
        from rlalign.sampling import sample_local as work
    else:
        from rlalign.runtime import sample_on_ray

        work: Any = partial(sample_on_ray, address=address)
    settings.model.recipe.announce()  # type: ignore[attr-defined]  # here: Ray's workers are unseen
    with common.exit_when_stopped("stopped"), common.exit_when_run_fails(local):
        result = work(settings, folder, _print_note)
    _print_table(result)
    if mp4:
        with disk_errors(folder):
            write_mp4s(folder / "pictures")
    print(f"pictures: {folder / 'pictures'}\nreport: {folder / 'report.html'}")


def _refuse_no_clips(settings: Any) -> None:
    """Raises UserError where no MP4 can be written."""
    from rlalign.core.mp4 import refuse_missing_encoder
    from rlalign.core.registry import UserError

    if settings.plan.frames == 1:
        raise UserError("--mp4 is for clips, and plan.frames must be above 1 for them, got 1")
    refuse_missing_encoder("--mp4")


def _print_note(record: dict[str, Any]) -> None:
    if "note" in record:
        print(record["note"], file=sys.stderr, flush=True)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from rlalign.report.numbers import number

    methods = result["methods"]
    count = len(result["pictures"])
    keys = [k for k in methods[0] if k.endswith("/mean") or k.startswith("diversity")]
    if keys[0] == "reward/total/mean" and sum(k.startswith("reward/") for k in keys) == 2:
        keys = keys[1:]  # of a single reward the total says nothing new
    # a column a method
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for one in methods:
        name = one["sampler"]["name"]
        table.add_column(
            name if one["title"] in ("method", name) else one["title"],
            justify="right",
            header_style="bold",
        )
    # rewards and diversity, then what they cost
    for key in keys:
        table.add_row(key, *(number(one[key]) for one in methods))
    for key in ("denoiser_calls", "backward_calls", "reward_queries", "gradient_calls"):
        if any(one["cost"][key] for one in methods):
            table.add_row(
                f"{key.replace('_', ' ')} a picture",
                *(number(one["cost"][key] / count) for one in methods),
            )
    if any(one["cost"]["missing_scores"] for one in methods):
        table.add_row(
            "missing scores (dropped)", *(str(one["cost"]["missing_scores"]) for one in methods)
        )
    Console(highlight=False).print(table)
