"""``rlalign train`` and ``rlalign pretrain``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlalign.registry import UserError

if TYPE_CHECKING:
    from rlalign.config import Run

FAILED, STOPPED = 1, 130


def train(
    config: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]...",
            help="A run file, and settings that override it by dotted path. With --resume no CONFIG, and rounds=N at most.",
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run folder.")] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray; the same numbers.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="A", help="Join the Ray cluster at this address (auto finds one here).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder; runs/NAME when left out.", show_default=False)
    ] = None,
) -> None:
    """Align a policy with its rewards."""
    if local and address is not None:
        raise UserError("--local and --address exclude each other: one process, or a cluster")
    if resume is not None and out is not None:
        raise UserError("--out is for a new run; --resume goes on in the run's own folder")
    run, folder = _resumed(resume, config or []) if resume is not None else _new(config or [], out)

    from rlalign.control import asked
    from rlalign.devices import usable
    from rlalign.evaluate import read_final
    from rlalign.metrics import Console

    if local:
        from rlalign.loop import train_local as work

        usable(run.runtime.device, "runtime.device")
    else:
        from rlalign.runtime import train_on_ray

        work = partial(train_on_ray, address=address)
    console = Console()
    console.begin(run.rounds, _done(folder))
    try:
        work(run, folder, resume=resume is not None, on_record=console.record)
        final = read_final(folder, run.rounds)
    except (KeyboardInterrupt, SystemExit):  # Ray Train turns Ctrl-C into the second, or just ends
        final = None
    except RuntimeError as error:
        if local or not is_run_failure(error):
            raise
        console.end()
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(FAILED) from error
    finally:
        console.end()  # gives the terminal back, also before an error is shown
    if final is None:
        print(f"stopped; go on with: rlalign train --resume {folder}", file=sys.stderr)
        raise typer.Exit(0 if asked(folder).stop else STOPPED)
    print(summary(final))
    if "stopped" in final:
        print(final["stopped"])
    print(f"policy: {folder / 'policy'}\nreport: {folder / 'report.html'}")


def is_run_failure(error: RuntimeError) -> bool:
    """Whether a run on Ray gave up: its message says which worker and why, and where we were when it did says nothing."""
    from rlalign.runtime.collect import RunFailed  # imports Ray, which must not happen before its environment is set

    return isinstance(error, RunFailed)


def _new(arguments: list[str], out: Path | None) -> tuple[Run, Path]:
    from rlalign.config import load_run

    if not arguments or "=" in arguments[0]:
        raise UserError("train needs a run file, as in: rlalign train configs/quickstart.yaml; or --resume RUN")
    run = load_run(arguments[0], arguments[1:])
    folder = out or Path("runs") / run.name
    refuse_what_is_there(folder, f"go on with: rlalign train --resume {folder}, or start anew elsewhere with --out DIR")
    return run, folder


def _resumed(folder: Path, arguments: list[str]) -> tuple[Run, Path]:
    from rlalign.config import load_run

    if not (folder / "config.yaml").is_file():
        raise UserError(f"--resume must name a run folder, and {str(folder)!r} has no config.yaml")
    for argument in arguments:
        if argument.partition("=")[0].strip() != "rounds":
            raise UserError(f"a run goes on under its own config.yaml; only rounds=N may change, got {argument!r}")
    run, done = load_run(folder / "config.yaml", arguments), _done(folder)
    if run.rounds < done:
        raise UserError(f"rounds must be >= {done}, the rounds that {folder} has done, got {run.rounds}")
    return run, folder


def refuse_what_is_there(folder: Path, way_out: str) -> None:
    """Raises UserError when ``folder`` is a file, or a folder with something in it (hidden files aside)."""
    if folder.is_dir():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{folder} is not empty; {way_out}")
    elif folder.exists():
        raise UserError(f"{folder} is a file and must be a folder; {way_out}")


def _done(folder: Path) -> int:
    """Rounds up to the newest checkpoint of a run folder."""
    numbers = [path.name.removeprefix("round-") for path in folder.glob("checkpoints/round-*")]
    return max((int(n) for n in numbers if n.isdigit()), default=0)


def summary(final: Mapping[str, Any]) -> str:
    """Every reward before and after."""
    from rlalign.report.numbers import gap, number, signed

    trained = [k for k in final["base"] if k.startswith("reward/") and k.endswith("/mean")]
    # of a single reward the total says nothing new, unless it has a weight
    total = trained[0] if len(trained) == 2 and len({final["base"][k] for k in trained}) == 1 else ""
    lines = []
    for key, before in final["base"].items():
        kind, _, rest = key.partition("/")
        title, _, what = rest.rpartition("/")
        if kind not in ("reward", "held_out") or what != "mean" or key == total:
            continue
        after = final["aligned"][key]
        wins = f"wins {100 * final['win_rate'][title]:.0f} % of {final['prompts']} prompts"
        name = "held-out reward" if kind == "held_out" else "reward"
        change = f"{number(before)} before, {number(after)} after ({signed(gap(before, after))}; {wins})"
        lines.append(f"{name} {title}: {change}")
    return "\n".join(lines)


def pretrain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A pretraining file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder.", show_default=False)] = None,
) -> None:
    """Train a denoiser from data. The same command goes on with a run that was stopped."""
    from rlalign.config import load_settings
    from rlalign.pretrain import Pretrain
    from rlalign.pretrain import pretrain as train_denoiser

    settings = load_settings(Pretrain, config, overrides or [])
    if out is not None:
        settings = settings.model_copy(update={"out": out})
    try:
        folder = train_denoiser(settings)
    except KeyboardInterrupt as error:
        print("stopped; the same command goes on", file=sys.stderr)
        raise typer.Exit(STOPPED) from error
    print(f"{folder.name}: {folder}")
