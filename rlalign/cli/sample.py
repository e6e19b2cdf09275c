"""``rlalign sample``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from rlalign.cli.train import FAILED, STOPPED, is_run_failure, refuse_what_is_there
from rlalign.registry import UserError


def sample(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A sample file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override it.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray; the same pictures.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="A", help="Join the Ray cluster at this address (auto finds one here).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder; runs/NAME when left out.", show_default=False)
    ] = None,
) -> None:
    """Sample with a test-time method.

    Writes pictures, scores and cost, and a page that shows the method beside plain sampling and best-of-N at the same cost.
    """
    from rlalign.sample import load_sample

    if local and address is not None:
        raise UserError("--local and --address exclude each other: one process, or a cluster")
    settings = load_sample(config, overrides or [])
    folder = out or Path("runs") / settings.name
    refuse_what_is_there(folder, "name another with --out DIR")
    if local:
        from rlalign.sample import sample_local as work
    else:
        from rlalign.runtime import sample_on_ray

        work: Any = partial(sample_on_ray, address=address)
    try:
        result = work(settings, folder, _say)
    except KeyboardInterrupt as error:
        print("stopped", file=sys.stderr)
        raise typer.Exit(STOPPED) from error
    except RuntimeError as error:
        if local or not is_run_failure(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error
    _table(result)
    print(f"pictures: {folder / 'pictures'}\nreport: {folder / 'report.html'}")


def _say(record: dict[str, Any]) -> None:
    if "note" in record:
        print(record["note"], file=sys.stderr, flush=True)


def _table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from rlalign.report.numbers import number

    methods, count = result["methods"], len(result["pictures"])
    keys = [k for k in methods[0] if k.endswith("/mean") or k.startswith("diversity")]
    if keys[0] == "reward/total/mean" and sum(k.startswith("reward/") for k in keys) == 2:
        keys = keys[1:]  # of a single reward the total says nothing new
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for one in methods:
        name = one["sampler"]["name"]
        table.add_column(
            name if one["title"] in ("method", name) else one["title"], justify="right", header_style="bold"
        )
    for key in keys:
        table.add_row(key, *(number(one[key]) for one in methods))
    for key in ("denoiser_calls", "backward_calls", "reward_queries", "gradient_calls"):
        if any(one["cost"][key] for one in methods):
            table.add_row(f"{key.replace('_', ' ')} a picture", *(number(one["cost"][key] / count) for one in methods))
    if any(one["cost"]["missing_scores"] for one in methods):
        table.add_row("missing scores (dropped)", *(str(one["cost"]["missing_scores"]) for one in methods))
    Console(highlight=False).print(table)
