"""``rlalign rllib``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlalign.cli.train import STOPPED, refuse_what_is_there


def rllib(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override it.")
    ] = None,
    runners: Annotated[int, typer.Option(min=0, help="RLlib's env runners; 0 samples in the learner's process.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder; runs/NAME-rllib when left out.", show_default=False)
    ] = None,
) -> None:
    """Train a run file by RLlib's PPO instead of rlalign's loop: a reference for small models.

    Denoising is the Gymnasium environment of rlalign/environment.py, the policy an RLModule; rounds, samples, learning rate,
    epochs and clip range are the run file's.
    """
    from rlalign.config import load_run
    from rlalign.runtime.cluster import prepare_environment

    run = load_run(config, overrides or [])
    folder = out or Path("runs") / f"{run.name}-rllib"
    refuse_what_is_there(folder, "name another with --out DIR")
    prepare_environment(None)
    from rlalign.runtime.rllib import train

    try:
        found = train(run, folder, _say, runners=runners)
    except KeyboardInterrupt as error:
        print("stopped", file=sys.stderr)
        raise typer.Exit(STOPPED) from error
    from rlalign.cli.train import summary

    print(summary(found))
    print(f"policy: {folder / 'policy'}")


def _say(line: dict[str, Any]) -> None:
    if "round" in line:
        print(f"round {line['round']:>3}  reward {line['reward/total/mean']:+.4f}", flush=True)
