"""``rlalign train`` and ``rlalign pretrain``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from rlalign.cli.common import (
    STOPPED,
    ClusterAddress,
    OutFolder,
    Overrides,
    exit_when_run_fails,
    exit_when_stopped,
    file_argument,
    place_option,
    refuse_both_places,
)
from rlalign.core.registry import UserError
from rlalign.storage import Place, find_place, look_at, name_of

if TYPE_CHECKING:
    from rlalign.config import Run

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG [KEY=VALUE]...",
        help=(
            "A run file, and settings that override it by dotted path. With --resume no CONFIG, and"
            " of settings those that change no number, such as rounds and runtime.rollout.workers."
        ),
    ),
]


def train(
    config: Arguments = None,
    resume: Annotated[
        str | None, place_option("Go on with this run folder, or the URL of one.", "RUN")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="In this process, without Ray; the same numbers.")
    ] = False,
    address: ClusterAddress = None,
    out: Annotated[
        str | None,
        place_option("The run folder, or a URL as s3://bucket/runs/NAME; runs/NAME when left out."),
    ] = None,
) -> None:
    """Align a policy with its rewards."""
    from rlalign.alignment.control import asked
    from rlalign.learning.evaluate import read_final

    refuse_both_places(local, address)
    if resume is not None and out is not None:
        raise UserError("--out is for a new run; --resume goes on in the run's own folder")
    begun = _resumed(resume, config or []) if resume is not None else _new(config or [], out)
    work = _choose_work(begun.run, local, address)

    # the training, and how it ended
    returned = _work_with_console(work, begun, resume=resume is not None, local=local)
    with look_at(begun.place) as folder:
        final = read_final(folder, begun.run.rounds) if returned else None
        if final is None:
            print(f"stopped; {_how_to_go_on(folder)}", file=sys.stderr)
            raise typer.Exit(0 if asked(folder).stop else STOPPED)
        print(f"policy: {name_of(folder / 'policy')}")
        print(summary(final))
        if "stopped" in final:
            print(final["stopped"])
        print(f"report: {name_of(folder / 'report.html')}")


def _choose_work(run: Run, local: bool, address: str | None) -> Callable[..., None]:
    """The function that trains, in this process or on Ray. Raises UserError for a device that this
    process does not have."""
    if not local:
        from rlalign.runtime import train_on_ray

        return partial(train_on_ray, address=address)
    from rlalign.alignment.loop import train_local
    from rlalign.networks.devices import usable

    usable(run.runtime.device, "runtime.device")
    return train_local


class _Begun(NamedTuple):
    """A run, where its folder is, and how many rounds a checkpoint there has."""

    run: Run
    place: Place
    done: int = 0


def _work_with_console(
    work: Callable[..., None], begun: _Begun, *, resume: bool, local: bool
) -> bool:
    """Trains, and shows every round; false where Ctrl-C or a signal ended it."""
    from rlalign.learning.metrics import Console

    console = Console()
    console.begin(begun.run.rounds, begun.done)
    with exit_when_run_fails(local):
        try:
            work(begun.run, begun.place, resume=resume, on_record=console.record)
            return True
        except (KeyboardInterrupt, SystemExit):  # Ray Train turns Ctrl-C into the second, or ends
            return False
        finally:
            # gives the terminal back, also before an error is shown
            console.end()


def _new(arguments: list[str], out: str | None) -> _Begun:
    from rlalign.config import load_run
    from rlalign.learning.folders import refuse_for_new_run

    if not arguments or "=" in arguments[0]:
        raise UserError(
            "train needs a run file, as in: rlalign train configs/quickstart.yaml; or --resume RUN"
        )
    run = load_run(arguments[0], arguments[1:])
    place = find_place(out or Path("runs") / run.name)
    with look_at(place) as folder:
        refuse_for_new_run(folder)
    run.policy.announce()  # here, as workers on Ray load out of sight
    return _Begun(run, place)


def _resumed(resume: str, arguments: list[str]) -> _Begun:
    from rlalign.config import load_begun, refuse_changes
    from rlalign.learning.folders import refuse_for_resume

    place = find_place(resume)
    with look_at(place) as folder:
        refuse_for_resume(folder)
        run = load_begun(folder / "config.yaml", arguments)
        done = _done(folder)
        refuse_changes(load_begun(folder / "config.yaml"), run)
        if run.rounds < done:
            raise UserError(
                f"rounds must be >= {done}, the rounds that {name_of(folder)} has done, got"
                f" {run.rounds}"
            )
    run.policy.announce()
    return _Begun(run, place, done)


def _how_to_go_on(folder: Path) -> str:
    from rlalign.learning.folders import has_begun

    if has_begun(folder):
        return f"go on with: rlalign train --resume {name_of(folder)}"
    return "no round was done, and the same command starts again"


def _done(folder: Path) -> int:
    """Rounds up to the newest checkpoint of a run folder."""
    numbers = [path.name.removeprefix("round-") for path in folder.glob("checkpoints/round-*")]
    return max((int(n) for n in numbers if n.isdigit()), default=0)


def summary(final: Mapping[str, Any]) -> str:
    """Every reward before and after."""
    from rlalign.report.numbers import gap, number, signed

    trained = [k for k in final["base"] if k.startswith("reward/") and k.endswith("/mean")]
    # of a single reward the total says nothing new, unless it has a weight
    total = (
        trained[0] if len(trained) == 2 and len({final["base"][k] for k in trained}) == 1 else ""
    )
    lines = []
    for key, before in final["base"].items():
        kind, _, rest = key.partition("/")
        title, _, what = rest.rpartition("/")
        if kind not in ("reward", "held_out") or what != "mean" or key == total:
            continue
        after = final["aligned"][key]
        wins = f"wins {100 * final['win_rate'][title]:.0f} % of {final['prompts']} prompts"
        name = "held-out reward" if kind == "held_out" else "reward"
        change = (
            f"{number(before)} before, {number(after)} after ({signed(gap(before, after))}; {wins})"
        )
        lines.append(f"{name} {title}: {change}")
    return "\n".join(lines)


def pretrain(
    config: Annotated[Path, file_argument("A pretraining file.")],
    overrides: Overrides = None,
    out: OutFolder = None,
) -> None:
    """Train a denoiser from data. The same command goes on with a run that was stopped."""
    from rlalign.config import load_settings
    from rlalign.fitting.denoiser import Pretrain
    from rlalign.fitting.denoiser import pretrain as train_denoiser

    settings = load_settings(Pretrain, config, overrides or [])
    if out is not None:
        settings = settings.model_copy(update={"out": out})
    with exit_when_stopped("stopped; the same command goes on"):
        folder = train_denoiser(settings)
    print(f"{folder.name}: {folder}")
