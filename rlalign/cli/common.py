"""What several commands share: arguments and options, exit codes, and how they print and end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rlalign.core.registry import UserError
from rlalign.storage import is_url

FAILED = 1
STOPPED = 130


def file_argument(what: str) -> Any:
    """The argument CONFIG, a file of this kind."""
    return typer.Argument(metavar="CONFIG", help=what, show_default=False)


def folder_option(what: str) -> Any:
    """The option --out, or another one that names a folder of this machine."""
    return typer.Option(metavar="DIR", help=what, show_default=False, parser=parse_folder)


def place_option(what: str, metavar: str = "DIR") -> Any:
    """An option that names a folder, or the URL of one on an object store."""
    return typer.Option(metavar=metavar, help=what, show_default=False)


def parse_folder(text: str | Path) -> Path:
    """What --out says, a folder of this machine. Raises UserError for a URL."""
    refuse_url(text, "--out")
    return Path(text)


def refuse_url(text: str | Path, place: str) -> None:
    """Raises UserError for a URL where only a folder of this machine will do."""
    if is_url(text):
        raise UserError(
            f"{place} must be a folder of this machine here, got {str(text)!r}: run folders of"
            " train and submit may be URLs; copy what this command writes there afterwards"
        )


def override_argument(what: str = "Settings that override it.") -> Any:
    """The arguments KEY=VALUE."""
    return typer.Argument(metavar="[KEY=VALUE]...", help=what)


Overrides = Annotated[list[str] | None, override_argument()]
OutFolder = Annotated[Path | None, folder_option("The run folder.")]
ClusterAddress = Annotated[
    str | None,
    typer.Option(metavar="A", help="Join the Ray cluster at this address (auto finds one here)."),
]


def refuse_both_places(local: bool, address: str | None) -> None:
    """Raises UserError where a command is told to work in one process and on a cluster."""
    if local and address is not None:
        raise UserError("--local and --address exclude each other: one process, or a cluster")


@contextlib.contextmanager
def exit_when_stopped(message: str) -> Iterator[None]:
    """Inside, Ctrl-C prints the message and ends the command with code 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        print(message, file=sys.stderr)
        raise typer.Exit(STOPPED) from error


@contextlib.contextmanager
def exit_when_run_fails(local: bool) -> Iterator[None]:
    """Inside, a run on Ray that gives up prints its message and ends the command with code 1.

    The message says which worker failed and why; where the driver was when it did says nothing.
    """
    try:
        yield
    except RuntimeError as error:
        if local or not _is_run_failure(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error


def _is_run_failure(error: RuntimeError) -> bool:
    # imports Ray, which must not happen before its environment is set
    from rlalign.runtime.training.collect import RunFailed

    return isinstance(error, RunFailed)


def print_columns(rows: Mapping[str, str]) -> None:
    """Prints names and values in two columns."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
