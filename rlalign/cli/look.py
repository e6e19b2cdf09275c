"""``rlalign list``, ``rlalign check`` and ``rlalign schema``: what starts nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlalign.cli.common import Overrides, file_argument, print_columns
from rlalign.core.registry import (
    SHELVES,
    Description,
    UserError,
    describe,
    nearest,
    shared_settings,
)

if TYPE_CHECKING:
    from rich.table import Table


_WIDE = 1000
"""Columns where nobody looks at a terminal: one line per plug-in."""


def list_plugins(
    shelf: Annotated[
        str | None,
        typer.Argument(
            metavar=f"[{'|'.join(SHELVES)}|jobs]",
            help="One shelf, all when left out; or a cluster's jobs.",
        ),
    ] = None,
    address: Annotated[
        str,
        typer.Option(
            metavar="URL", help="With jobs: the cluster's dashboard, as http://127.0.0.1:8265."
        ),
    ] = "",
) -> None:
    """List the plug-ins with their settings and sources, or with jobs the runs on a cluster."""
    from rich.console import Console

    if shelf == "jobs":
        from rlalign.cli.operate import list_jobs

        list_jobs(address)
        return
    if shelf is not None and shelf not in SHELVES:
        raise UserError(f"there is no shelf {shelf!r}; {nearest(shelf, list(SHELVES))}")
    # one line a plug-in where nobody looks at a terminal
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _WIDE
    for one in [shelf] if shelf else SHELVES:
        plugins = describe(one)
        with console.capture() as text:
            console.print(one, style="bold")
            if plugins:
                console.print(_table(plugins))
                common = ", ".join(
                    f"{name}={value}" for name, value in shared_settings(one).items()
                )
                console.print(f"each also takes {common}" if common else "", soft_wrap=True)
            else:
                console.print("nothing here yet")
        print("\n".join(line.rstrip() for line in text.get().splitlines()) + "\n")


def _table(plugins: Sequence[Description]) -> Table:
    from rich.table import Table

    # where weights come from is a column of shelves that have some to fetch
    columns = ["name", "what", "settings", "source"]
    if any(found.weights for found in plugins):
        columns.append("weights")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column == "name", overflow="fold", header_style="dim")
    for found in plugins:
        settings = [
            name if value == "required" else f"{name}={value}"
            for name, value in found.settings.items()
        ]
        row = [found.name, found.summary, ", ".join(settings) or "-", found.source]
        table.add_row(*row, *([found.weights or "-"] if "weights" in columns else []))
    return table


def check(
    config: Annotated[Path, file_argument("A run file, or a sample file.")],
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="A", help="Also: which node of the cluster there would get what."),
    ] = None,
) -> None:
    """Validate a run file or a sample file; start nothing.

    Prints what follows from it. Loads the policy, the rewards and the prompts once, so that what
    they lack shows here and not in the run.
    """
    from rlalign.cli.check.describe import NOT_READ, describe_run, describe_sample
    from rlalign.config import load_mapping

    data = load_mapping(config, overrides or [])
    if address is not None:
        from rlalign.runtime.cluster import answering

        answering(address)  # before what takes long
    describe_file = describe_sample if "sampler" in data else describe_run
    rows = describe_file(data, address)
    print_columns(rows)
    print("ok" if NOT_READ not in rows else "ok, as far as it was read")


def schema() -> None:
    """Print the JSON Schema of a run file.

    An editor that knows it completes and checks run files.
    """
    from rlalign.config import schema as json_schema

    print(json.dumps(json_schema(), indent=2))
