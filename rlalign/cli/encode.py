"""``rlalign encode``: a run's prompts as embeddings in a file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlalign.cli.common import file_argument
from rlalign.core.registry import UserError

if TYPE_CHECKING:
    from rlalign.config import RuntimeSettings

SUFFIX = ".safetensors"
Rest = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE] [KEY=VALUE]...",
        help=(
            "The .safetensors file, policy.embeddings of CONFIG when left out; and settings that"
            " override CONFIG."
        ),
        show_default=False,
    ),
]


def encode(
    config: Annotated[Path, file_argument("A run file, or a sample file.")], rest: Rest = None
) -> None:
    """Write the words of a run's prompts into a file.

    With policy.embeddings=FILE no process loads text encoders, and the numbers are the same. FILE
    has the prompts of the source and of evaluations, a preference set's captions, the empty prompt
    and the negative one; what it has already is kept.
    """
    import torch

    from rlalign.alignment.encode import encode_prompts
    from rlalign.learning.checkpoint import disk_errors
    from rlalign.networks.devices import usable

    # what is read, and where it is written
    given = rest or []
    named = [word for word in given if "=" not in word]
    recipe, prompts, runtime = _read_config(config, [word for word in given if "=" in word])
    file = _choose_file(named, recipe)
    device = usable(runtime.device, "runtime.device")
    torch.set_num_threads(runtime.rollout.threads)

    # each text once
    with disk_errors(file.parent), _show_progress() as tell:
        file.parent.mkdir(parents=True, exist_ok=True)
        written = encode_prompts(recipe, prompts(), file, device, tell)
    size = written.bytes * written.texts
    print(
        f"{file}: {written.texts:,} texts, {written.new:,} of them new, {size / 1e6:,.1f} MB; a run"
        f" reads it with policy.embeddings={file}"
    )


def _read_config(
    config: Path, overrides: list[str]
) -> tuple[Any, Callable[[], list[str]], RuntimeSettings]:
    """A file's policy, what gives its prompts, and its runtime."""
    from rlalign.alignment.encode import prompts_of
    from rlalign.config import load_mapping, locate_run, parse_run

    data = load_mapping(config, overrides)
    if "sampler" in data:
        from rlalign.sampling import parse_sample

        sample = parse_sample(data)
        unit = sample.unit
        return sample.model.recipe, lambda: list(unit.prompts), sample.runtime
    run = parse_run(data)
    alone = run.policy.model_copy(update={"embeddings": ""})
    elsewhere = run.model_copy(update={"policy": alone})
    located = locate_run(elsewhere, begun=False)
    return run.policy, lambda: prompts_of(located), run.runtime


def _choose_file(named: list[str], recipe: Any) -> Path:
    """The file that is to be written. Raises UserError where none is named, or something else, or
    where the policy could not read it."""
    if not recipe.family.reads_embeddings:
        raise UserError(
            f"policy {recipe.name} reads no file of embeddings: its words are those of a prompt and"
            " of the picture that it carries"
        )
    own = getattr(recipe, "embeddings", "")
    given = [*named, *([own] if own.endswith(SUFFIX) else [])]
    if not given or len(named) > 1:
        raise UserError(
            "encode needs one file to write, as in: rlalign encode CONFIG words.safetensors, or a"
            f" policy.embeddings that names one; got {' '.join(named) or 'none'}"
        )
    if not given[0].endswith(SUFFIX):
        raise UserError(f"FILE must end in {SUFFIX}, got {given[0]!r}")
    return Path(given[0])


@contextlib.contextmanager
def _show_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of texts on a terminal, a line each tenth elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_tenths
        return
    with Progress(console=console) as bars:
        task = bars.add_task("texts", total=None)
        yield lambda done, of: bars.update(task, completed=done, total=of)


def _print_tenths(done: int, of: int) -> None:
    if done * 10 // of > (done - 1) * 10 // of:
        print(f"{done:,} of {of:,} texts", file=sys.stderr, flush=True)
