"""``rlalign random-model``: a pipeline folder of random weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from rlalign.cli.common import print_columns
from rlalign.core.registry import UserError

if TYPE_CHECKING:
    from torch.nn import Module


FamilyName = Annotated[
    str,
    typer.Argument(
        metavar="FAMILY", help="Such as sdxl; a wrong name lists them.", show_default=False
    ),
]
NewFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Where to write.", show_default=False)
]
SizeName = Annotated[
    str,
    typer.Option(
        metavar="SIZE", help="tiny (float32), or published (bfloat16): that of the checkpoint."
    ),
]


def random_model(
    family: FamilyName,
    folder: NewFolder,
    size: SizeName = "tiny",
    seed: Annotated[int, typer.Option(metavar="N", help="Other weights.", min=0)] = 0,
    without_weights: Annotated[
        bool, typer.Option("--without-weights", help="Write configs and tokenizers alone.")
    ] = False,
) -> None:
    """Write a pipeline of random weights.

    Plain diffusers opens the folder, and so does a run; for tests, benchmarks and a dry run. Its
    tokenizers read letter by letter.
    """
    from rlalign.learning.checkpoint import disk_errors
    from rlalign.learning.folders import all_or_nothing, refuse_what_is_there
    from rlalign.networks import random_models

    # what is to be written, and whether it can be
    spec = random_models.find_family(family)
    if size not in get_args(random_models.Size):
        raise UserError(f"--size must be tiny or published, got {size!r}")
    chosen = cast(random_models.Size, size)
    refuse_what_is_there(folder, "name another folder")
    networks = random_models.empty_networks(spec, chosen)
    sizes = random_models.disk_bytes(networks, chosen)
    total = 0 if without_weights else sum(sizes.values())
    random_models.refuse_small_disk(folder, total)

    # what it will be, before it takes its time
    print(f"{spec.title}, {size}: {spec.pipeline}")
    _print_parts(networks, sizes)
    on_disk = f"{_read_size(total).strip()} on disk" if total else "without weights"
    print(f"{on_disk}; tokenizers read letter by letter", flush=True)

    # all files, or none
    with (
        disk_errors(folder),
        all_or_nothing(folder) as unfinished,
        _show_progress(total if size == "published" else 0) as tell,
    ):
        random_models.write_pipeline(
            unfinished, spec, chosen, seed=seed, with_weights=not without_weights, tell=tell
        )
    if not without_weights:
        print(f"{folder}: DiffusionPipeline.from_pretrained({str(folder)!r}) loads it")


def _print_parts(networks: Mapping[str, Module], sizes: Mapping[str, int]) -> None:
    """A line a part: its class, parameters and bytes on disk; and one for all."""
    from rlalign.networks.random_models import count_parameters

    counts = {part: count_parameters(network) for part, network in networks.items()}
    lines = {
        part: f"{type(networks[part]).__name__:<34} {count:>14,} parameters"
        f" {_read_size(sizes[part])}"
        for part, count in counts.items()
    }
    print_columns({**lines, "all": f"{'':<34} {sum(counts.values()):>14,} parameters"})


def _read_size(size: int) -> str:
    """Bytes as a number and a unit, in ten columns."""
    unit, name = next((u for u in ((1e9, "GB"), (1e6, "MB")) if size >= u[0]), (1e3, "kB"))
    return f"{size / unit:>7.1f} {name}"


@contextlib.contextmanager
def _show_progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar of bytes on a terminal, a line a file elsewhere; nothing where the total is 0."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not total:
        yield lambda part, written: None
        return
    if not console.is_terminal:
        yield lambda part, written: print(
            f"{part}: {_read_size(written).strip()} written", file=sys.stderr, flush=True
        )
        return
    text = TextColumn("{task.description}")
    with Progress(
        text, BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console
    ) as bars:
        task = bars.add_task("weights", total=total)
        yield lambda part, written: bars.update(task, description=part, advance=written)
