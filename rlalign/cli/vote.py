"""``rlalign vote``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlalign.cli import common
from rlalign.cli.common import ClusterAddress, Overrides, file_argument


def vote(
    config: Annotated[Path, file_argument("A vote file.")],
    overrides: Overrides = None,
    address: ClusterAddress = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="H",
            help="Address to listen on (server.host); 0.0.0.0 is every one.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            metavar="P",
            help="Port to listen on (server.port); 0 takes a free one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve the page where people choose between pictures, until Ctrl-C.

    It prints the link that people open; /results there has the numbers. Votes go to a store that
    rlalign train, fit-reward and ballots read.

    A vote file says whose pictures people see and what they are asked. A short one, for two
    pictures of a folder that has a subfolder for each caption:

    \b
    name: first
    source: {pictures: my_pictures}
    """
    from rlalign.voting.serve import serve_vote
    from rlalign.voting.settings import load_vote

    more = [f"server.host={host}"] if host is not None else []
    more += [f"server.port={port}"] if port is not None else []
    settings = load_vote(config, [*(overrides or []), *more])

    def print_ready(link: str) -> None:
        print(f"people vote at {link}; votes: {settings.shown_place}; Ctrl-C ends it", flush=True)

    def print_note(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    with common.exit_when_stopped("stopped"), common.exit_when_run_fails(address is None):
        if address is None:
            serve_vote(settings, print_note, on_ready=print_ready)
        else:
            from rlalign.runtime import serve_vote_on_ray

            serve_vote_on_ray(settings, print_note, on_ready=print_ready, address=address)
    # a page ends by a signal alone
    print(f"stopped; the votes are in {settings.shown_place}", file=sys.stderr)
    raise typer.Exit(common.STOPPED)
